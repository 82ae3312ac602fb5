"""Every combination of DeepSpeed's settings and models that ds_gradmix refuses, and why.

All of it is known from the config, the model and the mpu, so it is raised before DeepSpeed builds anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ds_gradmix.config import KEY, ConfigError, GradmixConfig


class Refusal(NamedTuple):
    """A setting of ds_config.json with which gradients would pass the rules by, or come out wrong."""

    path: str  # in ds_config.json
    default: object  # DeepSpeed's
    refused: Callable[[Any], bool]
    advice: str


class EngineRequest(NamedTuple):
    """What is known of an engine before it is built.

    Args:
        parallelism: the kinds besides that over data: "tensor", "pipeline", "experts", "sequence".
        optimizer: the name of the optimizer's class or type, None if there is no optimizer.
        num_replicas: ranks of the data-parallel group, None if DeepSpeed has yet to make it.
        pipeline_size: what an mpu without a PipelineModule says of pipeline parallelism.
        ranks: those that build the engine, None if they are all of the world's.
    """

    parallelism: frozenset[str] = frozenset()
    optimizer: str | None = "AdamW"
    num_replicas: int | None = None
    pipeline_size: int = 1
    ranks: Collection[int] | None = None


def _is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1", "on", "t", "yes", "y")  # as DeepSpeed's pydantic has it


_UNSUPPORTED = "is not supported by this version: "
_MUON = "reduces whole matrices to several owners (Muon): use another optimizer"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("zero_optimization.stage", 0, lambda v: v not in (0, 1, 2), _UNSUPPORTED + "set it to 1 or 2"),
    Refusal(
        "zero_optimization.zenflow",
        None,
        lambda v: v is not None,
        _UNSUPPORTED + "remove the ZenFlow section",
    ),
    Refusal(
        "compile.deepcompile",
        False,
        _is_true,
        "reduces inside the compiled graph (DeepCompile): set it to false",
    ),
    Refusal("optimizer.type", None, lambda v: "muon" in str(v).lower(), _MUON),
    Refusal(
        "expert_parallel.enabled",
        False,
        _is_true,
        "replaces layers by experts of its own (AutoEP), which " + _UNSUPPORTED + "set it to false, or use "
        "deepspeed.moe.layer.MoE",
    ),
    Refusal("torch_autocast.enabled", False, _is_true, _UNSUPPORTED + "use the bf16 or fp16 section"),
    Refusal("hybrid_engine.enabled", False, _is_true, _UNSUPPORTED + "set it to false"),
    Refusal(
        "prescale_gradients", False, _is_true, "scales gradients before the rules see them: set it to false"
    ),
)


def check_request(config: Mapping[str, Any], block: GradmixConfig, request: EngineRequest) -> None:
    """Refuse an engine that is about to be built.

    Raises:
        ConfigError: with one line for everything that has to be changed.
    """
    refused = [*refused_settings(config, block), *_refused_request(config, block, request)]
    if refused:
        raise ConfigError("\n".join(dict.fromkeys(refused)))


def refused_settings(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    """One line for each setting in a ds_config that cannot be combined with the block."""
    for refusal in REFUSALS:
        value = lookup(config, refusal.path, refusal.default)
        if refusal.refused(value):
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            yield f"{refusal.path}: {shown} {refusal.advice}"
    yield from _refused_combinations(config, block)


def _refused_request(
    config: Mapping[str, Any], block: GradmixConfig, request: EngineRequest
) -> Iterator[str]:
    kind, parallelism = f"ZeRO-{lookup(config, 'zero_optimization.stage', 0)}", request.parallelism
    reasons = [
        refused_engine(kind, "fp32", parallelism) if kind != "ZeRO-3" else None,
        refused_model_scope(block, parallelism),
        refused_worker(block, parallelism),
        refused_optimizer(request.optimizer),
    ]
    yield from (f'"{KEY}" with {kind}: {why}; or remove the "{KEY}" block' for why in reasons if why)
    if request.num_replicas and isinstance(block.worker, int) and request.num_replicas % block.worker:
        yield refused_worker_size(block.worker, request.num_replicas)
    if request.pipeline_size > 1:
        yield (
            f"mpu.get_pipeline_model_parallel_world_size(): {request.pipeline_size}, but the model is no "
            "PipelineModule, whose schedule DeepSpeed would run: pass a deepspeed.pipe.PipelineModule"
        )
    if request.ranks is not None:
        yield (
            f"mpu: its groups have the ranks {sorted(request.ranks)}, which are not all there are, and all "
            f'build an engine with a "{KEY}" block: remove the block from this engine, or start its ranks as '
            "a job of their own"
        )


def refused_optimizer(name: str | None) -> str | None:
    """Why an optimizer, by the name of its class, is refused, or None."""
    if name is None:
        return "the engine has no optimizer: add an optimizer section, or pass one to deepspeed.initialize"
    return f"the optimizer {name} {_MUON}" if "muon" in name.lower() else None


def _refused_combinations(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    stage = lookup(config, "zero_optimization.stage", 0)
    if block.decides_for_model and stage == 2:
        yield (
            'gradmix.scope: "model" needs every gradient before the first reduction, and ZeRO-2 '
            "(zero_optimization.stage: 2) exists to have thrown them away by then: set stage to 1, or scope "
            'to "bucket" or "parameter"'
        )
    if block.decides_for_model and lookup(config, "zero_optimization.overlap_comm", False) is True:
        yield (
            'gradmix.scope: "model" leaves nothing to overlap with backward: set '
            'zero_optimization.overlap_comm to false, or scope to "bucket" or "parameter"'
        )
    if block.extrapolation is not None and lookup(config, "managed_gradient_accumulation", True) is False:
        yield (
            "managed_gradient_accumulation: false leaves it open which backward pass is a step's last, and "
            "gradmix.extrapolation has to know: set it to true, or remove the extrapolation"
        )
    if block.nonfinite == "drop" and lookup(config, "fp16.enabled", False) is True:
        yield (
            'gradmix.nonfinite: "drop" would hide overflows from the loss scaling of fp16.enabled: true; set '
            'it to "propagate", or use bf16'
        )


ENGINES = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "BF16_Optimizer", "ZeRO-3")
DTYPES = ("fp32", "bf16", "fp16")
PARALLELISM: dict[str, frozenset[str]] = {
    "data": frozenset(),
    "tensor": frozenset({"tensor"}),
    "pipeline": frozenset({"pipeline"}),
    "tensor and pipeline": frozenset({"tensor", "pipeline"}),
    "experts": frozenset({"experts"}),
    "sequence": frozenset({"sequence"}),
}

_BF16_ONLY = "BF16_Optimizer (ZeRO-1, bf16, data_types.grad_accum_dtype fp32) has no other dtype"
_STAGE_3 = "ZeRO-3 reduces by a path of its own, which this version does not replace: set stage to 1 or 2"
_PIPELINE = "DeepSpeed's pipeline takes ZeRO-0 and ZeRO-1 only: set zero_optimization.stage to 1"
_TOGETHER = "is not supported together by this version: use one of them, or tensor with pipeline parallelism"


def refused_engine(engine: str, dtype: str, parallelism: frozenset[str]) -> str | None:
    """Why an engine of this kind is refused, or None: with README's support matrix, made from it, the whole
    truth.
    """
    if engine == "ZeRO-3":
        return _STAGE_3
    if engine == "BF16_Optimizer" and dtype != "bf16":
        return _BF16_ONLY
    if engine == "ZeRO-2" and "pipeline" in parallelism:
        return _PIPELINE
    if parallelism not in PARALLELISM.values():
        return f"{' and '.join(sorted(parallelism))} parallelism {_TOGETHER}"
    return None


def refused_model_scope(block: GradmixConfig, parallelism: frozenset[str]) -> str | None:
    """Why the scope `"model"` is refused with a kind of parallelism, or None."""
    if block.decides_for_model and "experts" in parallelism:
        return (
            'gradmix.scope: "model" is one decision for all workers, and experts are reduced over other '
            'workers than the rest: set it to "bucket" or "parameter"'
        )
    return None


def refused_worker(block: GradmixConfig, parallelism: frozenset[str]) -> str | None:
    """Why workers of several ranks are refused with a kind of parallelism, or None."""
    if block.worker not in ("rank", 1) and "experts" in parallelism:
        shown = f'"{block.worker}"' if isinstance(block.worker, str) else str(block.worker)
        return (
            f"gradmix.worker: {shown} is not supported with experts by this version, since they are reduced "
            'over other ranks than the rest: set it to "rank"'
        )
    return None


def refused_worker_size(worker: str | int, group_size: int, found: str = "") -> str:
    """That a data-parallel group cannot be divided into workers of this size; `found` on the nodes."""
    shown = '"node"' if worker == "node" else str(worker)
    return (
        f"gradmix.worker: {shown}, but a data-parallel group has {group_size} ranks{found}; allowed is a "
        'number that divides it, or "rank"'
    )


def lookup(config: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path of a nested mapping, or the default where any part of it is absent."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
