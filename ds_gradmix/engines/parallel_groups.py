"""Where a rank stands in a model that is divided over ranks: with whom it reduces, decides, and shares
parameters.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size

from ds_gradmix.comm.consistency import ConsistencyCheck
from ds_gradmix.comm.groups import RankGroup, TiedParameter, gather_objects, group_of, ranks_of
from ds_gradmix.comm.workers import ParallelGroups, WorkerGroup, WorkerLevels
from ds_gradmix.config import ConfigError, GradmixConfig, check_workers
from ds_gradmix.engines.compatibility import refused_sequence_group
from ds_gradmix.engines.worker_size import find_levels
from ds_gradmix.exchange.bucket import ParamInfo
from ds_gradmix.weights.extrapolated import ShardInfo

Named = Sequence[tuple[str, torch.nn.Parameter]]


def is_partitioned(p: Any) -> bool:
    """Whether tensor-parallel ranks hold different parts of a parameter."""
    return bool(is_model_parallel_parameter(p)) or is_moe_param(p)


def params_of(parallel: ParallelGroups, named: Named) -> tuple[list[ParamInfo], list[str]]:
    """What the rules need to know of an optimizer's parameters, and the names of all of the model's."""
    names = {name for name, _ in named}
    if parallel.is_pipeline:  # stages hold different ones
        names = set().union(*gather_objects(names))
    draws = {name: draw for draw, name in enumerate(sorted(names))}
    is_first = parallel.tensor is None or parallel.tensor.is_first
    if parallel.sum_sequence_ranks and parallel.sequence is not None:
        is_first = parallel.sequence.is_first
    infos = []
    p: Any
    for name, p in named:
        # Replicas are counted once, as DeepSpeed does in the gradient's norm.
        counted = not getattr(p, "ds_pipe_replicated", False) and (is_first or is_partitioned(p))
        workers = parallel.workers
        if is_moe_param(p):
            workers = parallel.experts[ranks_of(groups._get_expert_data_parallel_group(p.group_name))]
        partitioned = parallel.tensor is not None and is_partitioned(p)
        weight_sum = workers.size / parallel.workers.size
        infos.append(ParamInfo(name, draws[name], counted, partitioned, weight_sum))
    return infos, sorted(names)


def shard_info(parallel: ParallelGroups, named: Named) -> ShardInfo | None:
    """What offsets need to know of parameters that are kept on, or divided over, several ranks."""
    tensor = parallel.tensor
    if tensor is None and not parallel.tied:
        return None
    rank = 0 if tensor is None else tensor.rank
    labels = [f"{name} part {rank}" if is_partitioned(p) else name for name, p in named]
    counts = [tensor is None or tensor.is_first or is_partitioned(p) for _, p in named]
    return ShardInfo(labels, counts, tensor)


def find_parallel_groups(engine: Any, everyone: ConsistencyCheck, config: GradmixConfig) -> ParallelGroups:
    """The groups of this rank in an engine; all ranks must call this, once the engine has its process groups.

    Raises:
        ConfigError: on all ranks, if the groups are not made of workers as the block's `worker` says, or
            their number does not fit the mixing rule.
    """
    data = engine.seq_data_parallel_group
    sequence_size = int(engine.sequence_parallel_size)
    tensor = tensor_group(engine)
    is_pipeline = isinstance(engine.module, PipelineModule)
    pipe = engine.mpu.get_pipe_parallel_group() if is_pipeline else None
    sequence = RankGroup(groups._get_sequence_parallel_group()) if sequence_size > 1 else None
    sum_sequence_ranks = sequence is not None and not _shares_replicas(
        ranks_of(data), ranks_of(sequence.group)
    )
    near = [ranks_of(data), ranks_of(tensor), *([ranks_of(sequence.group)] if sequence is not None else [])]
    sets = gather_objects((near, [*near, ranks_of(pipe)]))
    stage_sets = _connected(own for own, _ in sets)
    model_sets = _connected(own for _, own in sets)
    stage = next(ranks for ranks in stage_sets if dist.get_rank() in ranks)
    model_ranks = next(ranks for ranks in model_sets if dist.get_rank() in ranks)
    decision_group = None if stage == sorted(ranks_of(data)) else RankGroup(group_of(stage_sets))
    levels = find_levels(data, config.worker, 1 if sum_sequence_ranks else sequence_size)
    workers = WorkerGroup(data, levels, decision_group, _node_levels(data, config))
    experts = _experts(engine, config)
    for group in (workers, *experts.values()):
        check_workers(config, group.size)
    model = workers.decision_group if model_ranks == stage else RankGroup(group_of(model_sets))
    return ParallelGroups(
        workers,
        model,
        everyone if len(stage_sets) == 1 else ConsistencyCheck(group_of(stage_sets, "gloo")),
        None if tensor is None else RankGroup(tensor),
        sequence,
        sum_sequence_ranks,
        experts,
        tied_parameters(engine.module) if is_pipeline else [],
        is_pipeline,
    )


def tensor_group(engine: Any) -> dist.ProcessGroup | None:
    """The ranks with other parts of this rank's parameters, None if there are none."""
    mpu = engine.mpu
    if mpu is None or bwc_tensor_model_parallel_world_size(mpu) == 1:
        return None
    if int(engine.sequence_parallel_size) > 1 and not hasattr(mpu, "get_tensor_model_parallel_world_size"):
        return None  # DeepSpeed's own calls its sequence-parallel group the model-parallel one, too
    return bwc_tensor_model_parallel_group(mpu)


def _connected(own_sets: Iterable[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Ranks that are connected by sharing a set with each other, directly or not; all of them, in order."""
    found: list[set[int]] = []
    for sets in own_sets:
        joined = set().union(*sets)
        others = [ranks for ranks in found if not ranks & joined]
        found = [*others, joined.union(*(ranks for ranks in found if ranks & joined))]
    return sorted(sorted(ranks) for ranks in found)


def _shares_replicas(data: tuple[int, ...], sequence: tuple[int, ...]) -> bool:
    """Whether the group that DeepSpeed reduces over is made of the sequence ranks of replicas, as an mpu with
    `get_sequence_data_parallel_group` tells it. `mesh_param` and `sequence_parallel_size` do not: then one
    sequence rank of every replica is in it.
    """
    if not set(sequence) <= set(data):
        return False
    begin = data.index(sequence[0])
    if begin % len(sequence) or data[begin : begin + len(sequence)] != sequence:
        raise ConfigError(refused_sequence_group(sequence, data))
    return True


def _node_levels(group: dist.ProcessGroup | None, config: GradmixConfig) -> WorkerLevels | None:
    """The ranks of a node, where gradients are summed there first; a call of all ranks."""
    if config.transport == "deepspeed":
        return None
    try:
        levels = find_levels(group, "node", 1)
    except ConfigError:  # nodes of different sizes: on all ranks
        return None
    if levels is None or levels.inter.num_ranks == 1:
        return None
    return levels._replace(num_replicas=1)  # a sum, and no mean


def _experts(engine: Any, config: GradmixConfig) -> dict[tuple[int, ...], WorkerGroup]:
    if not engine.has_moe_layers:
        return {}
    found = {}
    for name in sorted(engine.expert_data_parallel_group):
        group = engine.expert_data_parallel_group[name]
        found[ranks_of(group)] = WorkerGroup(group, node_levels=_node_levels(group, config))
    return found


def tied_parameters(module: PipelineModule) -> list[tuple[torch.nn.Parameter, TiedParameter]]:
    """This stage's parameters that other stages keep, too, in the same order on all of them."""
    found = []
    for key in sorted(module.tied_comms):
        comm = module.tied_comms[key]
        copies = TiedParameter(comm["ranks"], comm["group"])
        for attribute in comm["weight_attr"]:
            found.append((module._recursive_getattr(module.tied_modules[key], attribute), copies))
    return found
