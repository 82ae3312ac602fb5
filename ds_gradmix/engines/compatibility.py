"""What of DeepSpeed ds_gradmix does not support, as a table; everything in it is refused when the engine is
built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ds_gradmix.config import GradmixConfig

TESTED_DEEPSPEED = ("0.19.8",)


class Refusal(NamedTuple):
    """A setting of ds_config.json with which gradients would pass the rules by, or come out wrong."""

    path: str  # in ds_config.json
    default: object  # DeepSpeed's
    refused: Callable[[Any], bool]
    advice: str


def _is_true(value: object) -> bool:
    return value is True


_UNSUPPORTED = "is not supported by this version: "

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
    Refusal(
        "optimizer.type",
        None,
        lambda v: isinstance(v, str) and "muon" in v.lower(),
        "reduces whole matrices to several owners (Muon): use another optimizer",
    ),
    Refusal(
        "optimizer.type",
        None,
        lambda v: isinstance(v, str) and v.lower().replace("_", "").startswith(("onebit", "zeroone")),
        "compresses and reduces gradients itself (1-bit optimizers): use another optimizer",
    ),
    Refusal(
        "expert_parallel.enabled",
        False,
        _is_true,
        "replaces layers by experts of its own (AutoEP), which " + _UNSUPPORTED + "set it to false, or use "
        "deepspeed.moe.layer.MoE",
    ),
    Refusal("torch_autocast.enabled", False, _is_true, _UNSUPPORTED + "use the bf16 or fp16 section"),
    Refusal("amp.enabled", False, _is_true, _UNSUPPORTED + "use the bf16 or fp16 section"),
    Refusal("hybrid_engine.enabled", False, _is_true, _UNSUPPORTED + "set it to false"),
    Refusal("sparse_gradients", False, _is_true, _UNSUPPORTED + "set it to false"),
    Refusal(
        "prescale_gradients", False, _is_true, "scales gradients before the rules see them: set it to false"
    ),
)


def refused_settings(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    """One line for each setting in a ds_config that cannot be combined with the block."""
    for refusal in REFUSALS:
        value = lookup(config, refusal.path, refusal.default)
        if refusal.refused(value):
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            yield f"{refusal.path}: {shown} {refusal.advice}"
    yield from _refused_combinations(config, block)


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


def lookup(config: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path of a nested mapping, or the default where any part of it is absent."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
