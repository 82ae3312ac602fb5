"""Every combination of DeepSpeed's settings and models that ds_gradmix refuses, and why.

Nearly all of it is known from the config, the model and the mpu, and raised before DeepSpeed builds anything.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ds_gradmix.config import KEY, ConfigError, GradmixConfig
from ds_gradmix.config_messages import value_text


class Refusal(NamedTuple):
    """A setting of ds_config.json with which gradients would pass the rules by, or come out wrong."""

    path: str  # in ds_config.json; DeepSpeed's default is never refused
    refused: Callable[[Any], bool]
    advice: str


class EngineRequest(NamedTuple):
    """What is known of an engine before it is built."""

    parallelism: frozenset[str]  # besides that over data: "tensor", "pipeline", "experts", "sequence"
    optimizer: str | None  # the name of its class or type, None if there is no optimizer
    num_replicas: int | None  # ranks of the data-parallel group, None if DeepSpeed has yet to make it
    pipeline_size: int  # what an mpu without a PipelineModule says of pipeline parallelism
    ranks: Collection[int] | None  # those that build the engine, None if they are all of the world's


def _is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1", "on", "t", "yes", "y")  # as DeepSpeed's pydantic has it


_UNSUPPORTED = "is not supported by this version: "
_DEEPCOMPILE = "reduces inside the compiled graph (DeepCompile): set it to false"
_MUON = "reduces whole matrices to several owners (Muon): use another optimizer"
_AUTOEP = f"replaces layers by experts of its own (AutoEP), which {_UNSUPPORTED}set it to false, or use "
_PRESCALE = "scales gradients before the rules see them: set it to false"

_BY_STAGE_3 = "is not supported with a gradmix block at stage 3 by this version: "

REFUSALS = (
    Refusal("zero_optimization.stage", lambda v: v not in (0, 1, 2, 3), _UNSUPPORTED + "set it to 1, 2 or 3"),
    Refusal(
        "zero_optimization.zenflow", lambda v: v is not None, _UNSUPPORTED + "remove the ZenFlow section"
    ),
    Refusal("compile.deepcompile", _is_true, _DEEPCOMPILE),
    Refusal("optimizer.type", lambda v: "muon" in str(v).lower(), _MUON),
    Refusal("expert_parallel.enabled", _is_true, _AUTOEP + "deepspeed.moe.layer.MoE"),
    Refusal("torch_autocast.enabled", _is_true, _UNSUPPORTED + "use the bf16 or fp16 section"),
    Refusal("hybrid_engine.enabled", _is_true, _UNSUPPORTED + "set it to false"),
    Refusal("prescale_gradients", _is_true, _PRESCALE),
)

# Of these only with ZeRO-3; values are those that switch them on.
REFUSALS_OF_STAGE_3 = (
    Refusal("zero_optimization.reduce_scatter", lambda v: not _is_true(v), _BY_STAGE_3 + "remove it"),
    Refusal(
        "zero_optimization.zero_hpz_partition_size", lambda v: v != 1, _BY_STAGE_3 + "set it to 1 (hpZ off)"
    ),
    Refusal("zero_optimization.zero_quantized_weights", _is_true, _BY_STAGE_3 + "set it to false"),
    Refusal(
        "zero_optimization.zero_quantized_nontrainable_weights", _is_true, _BY_STAGE_3 + "set it to false"
    ),
    Refusal("zero_optimization.zero_quantized_gradients", _is_true, _BY_STAGE_3 + "set it to false"),
    Refusal("zero_optimization.mics_shard_size", lambda v: v != -1, _BY_STAGE_3 + "remove it (MiCS)"),
    Refusal(
        "zero_optimization.offload_optimizer.device",
        lambda v: v == "nvme",
        _BY_STAGE_3 + 'set it to "cpu" or "none"',
    ),
    Refusal(
        "zero_optimization.offload_param.device",
        lambda v: v == "nvme",
        _BY_STAGE_3 + 'set it to "cpu" or "none"',
    ),
    Refusal("zero_optimization.offload_optimizer.super_offload", _is_true, _BY_STAGE_3 + "set it to false"),
    Refusal("zero_optimization.offload_optimizer.ratio", lambda v: v != 1, _BY_STAGE_3 + "set it to 1.0"),
)


def check_request(config: Mapping[str, Any], block: GradmixConfig, request: EngineRequest) -> None:
    """Raise a ConfigError, with a line for everything that has to be changed before an engine is built."""
    refused = [*refused_settings(config, block), *_refused_request(config, block, request)]
    if refused:
        raise ConfigError("\n".join(dict.fromkeys(refused)))


def refused_settings(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    """One line for each setting in a ds_config that cannot be combined with the block."""
    yield from _refused_by(REFUSALS, config)
    stage = lookup(config, "zero_optimization.stage", 0)
    if block.decides_for_model and stage in (2, 3):
        yield (
            f'gradmix.scope: "model" needs every gradient before the first reduction, and ZeRO-{stage} '
            f"(zero_optimization.stage: {stage}) exists to have thrown them away by then: set stage to 1, or "
            'scope to "bucket" or "parameter"'
        )
    if stage == 3:
        yield from _refused_at_stage_3(config, block)
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


def _refused_by(refusals: Sequence[Refusal], config: Mapping[str, Any]) -> Iterator[str]:
    absent = object()
    for refusal in refusals:
        value = lookup(config, refusal.path, absent)
        if value is not absent and refusal.refused(value):
            yield f"{refusal.path}: {value_text(value)} {refusal.advice}"


def _refused_at_stage_3(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    yield from _refused_by(REFUSALS_OF_STAGE_3, config)
    if block.extrapolation is not None and block.extrapolation.needs_gradient:
        yield f"gradmix.extrapolation: {type(block.extrapolation).type_name()} {_WHOLE_GRADIENT}"
    offloads = lookup(config, "zero_optimization.offload_optimizer.device", "none") != "none"
    if offloads and lookup(config, "managed_gradient_accumulation", True) is False:
        yield f"managed_gradient_accumulation: false, with offload_optimizer, {_BY_STAGE_3}set it to true"
    if block.worker not in ("rank", 1):
        yield f'gradmix.worker: {value_text(block.worker)} {_BY_STAGE_3}set it to "rank"'


_WHOLE_GRADIENT = (
    "needs a whole gradient of its own on every rank, which ZeRO-3 exists to do without: set "
    "zero_optimization.stage to 1 or 2"
)


def _refused_request(
    config: Mapping[str, Any], block: GradmixConfig, request: EngineRequest
) -> Iterator[str]:
    kind = f"ZeRO-{lookup(config, 'zero_optimization.stage', 0)}"
    reasons = [refused_engine(kind, "fp32", request.parallelism)]
    if "experts" in request.parallelism:
        reasons += [_refused_scope(block), refused_worker(block)]
    reasons.append(refused_optimizer(request.optimizer))
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


def refused_flat_partition(name: str, kind: str) -> str:
    """That an optimizer with trust ratios would take one for a whole flat partition."""
    return (
        f"optimizer: {name} steps on flat partitions of many parameters with {kind}, and would take one "
        'trust ratio for each of them: use "optimizer": {"type": "Lamb"} or {"type": "LARS"} in '
        "ds_config.json, or ds_gradmix.optim.Lamb or Lars, which know where parameters lie, or ZeRO-0"
    )


REFUSED_UNIVERSAL = (
    "checkpoint.load_universal: true, but ds_to_universal knows the state of Adam and LAMB (exp_avg and "
    "exp_avg_sq), not that of LARS: load a checkpoint that was saved by as many ranks"
)
_TRUST_RATIOS = ("lamb", "lars", "larc")


def has_trust_ratios(name: str | None) -> bool:
    """Whether an optimizer, by the name of its class, takes trust ratios of what it is given."""
    return any(word in (name or "").lower() for word in _TRUST_RATIOS)


ENGINES = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "BF16_Optimizer", "ZeRO-3")
DTYPES = ("fp32", "bf16", "fp16")
_SUPPORTED = ("data", "tensor", "pipeline", "tensor and pipeline", "experts", "sequence")
PARALLELISM = {name: frozenset(name.split(" and ")) - {"data"} for name in _SUPPORTED}


def refused_rule(engine: str, slot: str) -> str | None:
    """Which rule of a slot is refused on an engine that takes others, and why, or None."""
    if engine == "ZeRO-3" and slot == "extrapolation":
        return f"but for PastGradient, which {_WHOLE_GRADIENT}"
    return None


def refused_engine(engine: str, dtype: str, parallelism: frozenset[str]) -> str | None:
    """Why an engine of this kind is refused, or None; the matrix of docs/parallelism.md is made from it."""
    if engine == "ZeRO-3" and parallelism:
        return "ZeRO-3 is supported for data parallelism alone by this version: set stage to 1 or 2"
    if engine == "BF16_Optimizer" and dtype != "bf16":
        return "BF16_Optimizer (ZeRO-1, bf16, data_types.grad_accum_dtype fp32) has no other dtype"
    if engine == "ZeRO-2" and "pipeline" in parallelism:
        return "DeepSpeed's pipeline takes ZeRO-0 and ZeRO-1 only: set zero_optimization.stage to 1"
    if parallelism not in PARALLELISM.values():
        return (
            f"{' and '.join(sorted(parallelism))} parallelism is not supported together by this version: "
            "use one of them, or tensor with pipeline parallelism"
        )
    return None


def _refused_scope(block: GradmixConfig) -> str | None:
    if not block.decides_for_model:
        return None
    return (
        'gradmix.scope: "model" is one decision for all workers, and experts are reduced over other '
        'workers than the rest: set it to "bucket" or "parameter"'
    )


def refused_worker(block: GradmixConfig) -> str | None:
    """Why workers of several ranks are refused in a model with experts, or None."""
    if block.worker in ("rank", 1):
        return None
    return (
        f"gradmix.worker: {value_text(block.worker)} is not supported with experts by this version, since "
        'they are reduced over other ranks than the rest: set it to "rank"'
    )


def refused_worker_size(worker: str | int, group_size: int, found: str = "") -> str:
    """That a data-parallel group cannot be divided into workers of this size; `found` on the nodes."""
    return (
        f"gradmix.worker: {value_text(worker)}, but a data-parallel group has {group_size} ranks{found}; "
        'allowed is a number that divides it, or "rank"'
    )


def refused_part_of_replica(worker: str | int, ranks_per_replica: int, found: str) -> str:
    """That a worker would have a part of a replica that sequence parallelism divides over several ranks."""
    return (
        f"gradmix.worker: {value_text(worker)}, but {ranks_per_replica} ranks share a replica by sequence "
        f'parallelism{found}; allowed is a multiple of these, or "rank" for one replica'
    )


def refused_nodes(sets: Sequence[Sequence[int]]) -> str:
    """That data-parallel groups, given by their ranks, cannot be divided into nodes of one size."""
    return (
        'gradmix.worker: "node", but data-parallel groups do not have the same number of consecutive '
        f'ranks on every node: {list(map(list, sets))}; allowed there is a number of ranks, or "rank"'
    )


def refused_rank_order(host: str, rank: int, local_rank: int | None) -> str:
    """That the ranks of a node do not follow each other."""
    return (
        f'gradmix.worker: "node", but the ranks of node {host} do not follow each other (rank {rank} has '
        f"LOCAL_RANK {local_rank}); allowed are launchers that fill one node after another, or a number of "
        'ranks, or "rank"'
    )


def refused_sequence_group(sequence: Sequence[int], data: Sequence[int]) -> str:
    """That the ranks which share a replica are not neighbours in the group that DeepSpeed reduces over."""
    return (
        f"sequence parallelism: ranks {list(sequence)} share a replica, and are not neighbours in the "
        f"group {list(data)} that gradients are reduced over: order the ranks of the mpu's "
        "get_sequence_data_parallel_group() by replicas"
    )


def lookup(config: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path of a nested mapping, or the default where any part of it is absent."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
