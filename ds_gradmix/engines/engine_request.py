"""What is known of an engine from the arguments of its constructor, before anything is built."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from ds_gradmix.comm.groups import ranks_of
from ds_gradmix.engines.compatibility import EngineRequest, lookup
from ds_gradmix.engines.deepspeed_api import parameters_of

_PARAMETERS = parameters_of("deepspeed.runtime.engine.DeepSpeedEngine.__init__")
# Groups all of whose ranks build the same engine.
_GROUPS = [
    f"get_{kind}_parallel_group"
    for kind in ("data", "sequence_data", "sequence", "context", "model", "tensor_model", "pipeline_model")
]


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an engine's constructor by name."""
    return dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)


def config_of(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ds_config as DeepSpeed has read it."""
    found = getattr(given.get("config_class"), "_param_dict", {})
    return found if isinstance(found, Mapping) else {}


def groups_of(given: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Sets of ranks that are sure to build this engine together: all, if no mpu tells otherwise."""
    mpu = given.get("mpu")
    if not dist.is_initialized():
        return []
    if mpu is None or isinstance(given.get("model"), PipelineModule):  # whose grid is made of all ranks
        return [tuple(range(dist.get_world_size()))]
    found = []
    for name in _GROUPS:
        with contextlib.suppress(AssertionError):  # Megatron's for a group that is not made
            if hasattr(mpu, name):
                found.append(ranks_of(getattr(mpu, name)()))
    return list(dict.fromkeys(found))


def request_of(
    config: Mapping[str, Any], given: Mapping[str, Any], groups: list[tuple[int, ...]]
) -> EngineRequest:
    """What an engine is refused or accepted by."""
    model, mesh = given.get("model"), given.get("mesh_device")
    mpu: Any = given.get("mpu")
    is_pipeline = isinstance(model, PipelineModule)
    sequence = int(getattr(mpu, "get_sequence_parallel_world_size", lambda: 1)())
    if mesh is not None:
        sequence = dist.get_world_size(mesh.get_group(mesh_dim="sequence_parallel"))
    tensor = int(lookup(config, "tensor_parallel.autotp_size", 0) or 0)
    if mpu is not None and (sequence == 1 or hasattr(mpu, "get_tensor_model_parallel_world_size")):
        tensor = max(tensor, int(bwc_tensor_model_parallel_world_size(mpu)))
    experts = model is not None and any(isinstance(module, MoE) for module in model.modules())
    kinds = {"tensor": tensor > 1, "sequence": sequence > 1, "experts": experts, "pipeline": is_pipeline}
    optimizer = given.get("optimizer") or lookup(config, "optimizer.type", None)
    if optimizer is not None and not isinstance(optimizer, str):
        optimizer = getattr(optimizer, "__name__", type(optimizer).__name__)
    replicas = None  # where DeepSpeed has yet to make the group
    if sequence == 1 and hasattr(mpu, "get_data_parallel_world_size"):
        replicas = int(mpu.get_data_parallel_world_size())
    elif sequence == 1 and mpu is None and tensor <= 1:
        replicas = dist.get_world_size()
    return EngineRequest(
        frozenset(kind for kind, there in kinds.items() if there),
        optimizer,
        replicas,
        1 if is_pipeline else int(getattr(mpu, "get_pipeline_model_parallel_world_size", lambda: 1)()),
        _subset_of(groups),
    )


def _subset_of(groups: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The ranks of an engine that is sure not to take in all of the world's: one that no other group
    reaches out of. With several kinds of parallelism one rank cannot know that.
    """
    reached = set().union(*groups)
    closed = any(set(ranks) == reached for ranks in groups) and len(reached) < dist.get_world_size()
    return tuple(sorted(reached)) if closed else None
