"""Where a rank stands in a model that is divided over ranks: with whom it reduces, decides, and shares
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size

from ds_gradmix.config import ConfigError
from ds_gradmix.engines.team import find_team
from ds_gradmix.lookahead import Division
from ds_gradmix.reduction import Parameter
from ds_gradmix.workers import Circle, Copies, Hosts, Workers, gather_objects, groups_of


@dataclass(frozen=True)
class Place:
    """This rank among the others.

    Args:
        workers: the data-parallel replicas of what this rank holds; its `deciders` are these and their
            tensor-parallel parts.
        model: all ranks with a part of the same model, pipeline stages included.
        hosts: the hosts of the deciders.
        tensor: the tensor-parallel ranks, None if there is one.
        sequence: the ranks that share one replica's sequences, None if there is one.
        apart: whether these are not in the group that DeepSpeed reduces over, so that nobody adds them up.
        experts: workers by the ranks of an expert data-parallel group.
        tied: parameters that several pipeline stages keep, in an order that all of them follow.
    """

    workers: Workers
    model: Circle
    hosts: Hosts
    tensor: Circle | None
    sequence: Circle | None
    apart: bool
    experts: Mapping[tuple[int, ...], Workers]
    tied: Sequence[tuple[torch.nn.Parameter, Copies]]
    is_pipeline: bool

    @property
    def parallelism(self) -> frozenset[str]:
        """The kinds of parallelism besides that over data."""
        found = {
            "tensor": self.tensor is not None,
            "sequence": self.sequence is not None,
            "experts": bool(self.experts),
            "pipeline": self.is_pipeline,
        }
        return frozenset(name for name, there in found.items() if there)

    def describe(self) -> str:
        """What a worker is made of, and how a replica is divided, in words; nothing if it is not."""
        found = []
        if self.workers.replicas_per_worker > 1:
            found.append(f"each the mean of {self.workers.replicas_per_worker} replicas")
        if self.tensor is not None:
            found.append(f"tensor parallel {self.tensor.num_ranks}")
        if self.is_pipeline:
            found.append(f"pipeline of {self.model.num_ranks // self.workers.deciders.num_ranks}")
        if self.sequence is not None:
            found.append(f"sequence parallel {self.sequence.num_ranks}")
        if self.experts:
            sizes = sorted(self.workers.size // workers.size for workers in self.experts.values())
            found.append(f"expert parallel {', '.join(map(str, sizes))}")
        return "".join(f", {words}" for words in found)

    @property
    def alike(self) -> bool:
        """Whether the workers take part in every decision on the model, and so know them all."""
        return not self.experts and self.model.num_ranks == self.workers.num_ranks

    def reducers(self, p: Any) -> Workers:
        """Who reduces a parameter."""
        if not is_moe_param(p):
            return self.workers
        return self.experts[tuple(ranks_of(groups._get_expert_data_parallel_group(p.group_name)))]

    def parameters(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[Parameter]:
        """What the rules need to know of an optimizer's parameters."""
        pairs = list(named)
        names = {name for name, _ in pairs}
        if self.is_pipeline:  # stages hold different ones
            names = set().union(*gather_objects(names))
        draws = {name: draw for draw, name in enumerate(sorted(names))}
        return [Parameter(name, draws[name], self._counts(p)) for name, p in pairs]

    def _counts(self, p: torch.nn.Parameter) -> bool:
        """Replicas are counted once, as DeepSpeed does in the gradient's norm."""
        if getattr(p, "ds_pipe_replicated", False):
            return False
        return self._is_first_part or self.divides(p)

    @property
    def _is_first_part(self) -> bool:
        """Of ranks that hold the same gradients, though they are not in one group of workers."""
        if self.apart and self.sequence is not None:
            return self.sequence.is_first
        return self.tensor is None or self.tensor.is_first

    @staticmethod
    def divides(p: torch.nn.Parameter) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return bool(is_model_parallel_parameter(p)) or is_moe_param(p)

    def division(self, named: Sequence[tuple[str, torch.nn.Parameter]]) -> Division | None:
        """What offsets need to know of parameters that are kept on, or divided over, several ranks."""
        if self.tensor is None and not self.tied:
            return None
        rank = 0 if self.tensor is None else self.tensor.rank
        labels = [f"{name} part {rank}" if self.divides(p) else name for name, p in named]
        counts = [self.tensor is None or self.tensor.is_first or self.divides(p) for _, p in named]
        return Division(labels, counts, self.tensor)


def find_place(engine: Any, everyone: Hosts, worker: str | int) -> Place:
    """The place of an engine's rank; all ranks must ask together, once the engine has its process groups.

    Args:
        engine: DeepSpeed's.
        everyone: the hosts of all ranks.
        worker: the block's `worker`.

    Raises:
        ConfigError: on all ranks, if the groups are not made of such workers.
    """
    data = engine.seq_data_parallel_group
    sequence_size = int(engine.sequence_parallel_size)
    tensor = _tensor_group(engine, sequence_size)
    is_pipeline = isinstance(engine.module, PipelineModule)
    pipe = engine.mpu.get_pipe_parallel_group() if is_pipeline else None
    if not is_pipeline and engine.mpu is not None:
        pipe = _megatron_pipeline(engine.mpu)
    sequence = Circle(groups._get_sequence_parallel_group()) if sequence_size > 1 else None
    apart = sequence is not None and not _shares_replicas(ranks_of(data), ranks_of(sequence.group))
    near = [ranks_of(data), ranks_of(tensor), *([ranks_of(sequence.group)] if sequence is not None else [])]
    sets = gather_objects((near, [*near, ranks_of(pipe)]))
    stage_sets = _connected(own for own, _ in sets)
    model_sets = _connected(own for _, own in sets)
    stage = next(ranks for ranks in stage_sets if dist.get_rank() in ranks)
    model_ranks = next(ranks for ranks in model_sets if dist.get_rank() in ranks)
    deciders = None if stage == sorted(ranks_of(data)) else Circle(groups_of(stage_sets))
    workers = Workers(data, find_team(data, worker, 1 if apart else sequence_size), deciders)
    model = workers.deciders if model_ranks == stage else Circle(groups_of(model_sets))
    return Place(
        workers,
        model,
        everyone if len(stage_sets) == 1 else Hosts(groups_of(stage_sets, "gloo")),
        None if tensor is None else Circle(tensor),
        sequence,
        apart,
        _experts(engine),
        _tied(engine.module) if is_pipeline else [],
        is_pipeline,
    )


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    """The global ranks of a group; this one alone if there is none."""
    return [dist.get_rank()] if group is None else list(dist.get_process_group_ranks(group))


def _tensor_group(engine: Any, sequence_size: int) -> dist.ProcessGroup | None:
    mpu = engine.mpu
    if mpu is None or bwc_tensor_model_parallel_world_size(mpu) == 1:
        return None
    if sequence_size > 1 and not hasattr(mpu, "get_tensor_model_parallel_world_size"):
        return None  # DeepSpeed's own calls its sequence-parallel group the model-parallel one, too
    return bwc_tensor_model_parallel_group(mpu)


def _megatron_pipeline(mpu: Any) -> dist.ProcessGroup | None:
    size: Callable[[], int] | None = getattr(mpu, "get_pipeline_model_parallel_world_size", None)
    if size is not None and size() > 1:
        raise ConfigError(
            f"mpu.get_pipeline_model_parallel_world_size(): {size()}, but the model is no PipelineModule, "
            "whose schedule DeepSpeed would run: pass a deepspeed.pipe.PipelineModule"
        )
    return None


def _connected(own_sets: Iterable[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Ranks that are connected by sharing a set with each other, directly or not; all of them, in order."""
    found: list[set[int]] = []
    for sets in own_sets:
        joined = set().union(*sets)
        apart = [ranks for ranks in found if not ranks & joined]
        found = [*apart, joined.union(*(ranks for ranks in found if ranks & joined))]
    return sorted(sorted(ranks) for ranks in found)


def _shares_replicas(data: list[int], sequence: list[int]) -> bool:
    """Whether the group that DeepSpeed reduces over is made of the sequence ranks of replicas, as an mpu with
    `get_sequence_data_parallel_group` tells it. `mesh_param` and `sequence_parallel_size` do not: then one
    sequence rank of every replica is in it.
    """
    if not set(sequence) <= set(data):
        return False
    begin = data.index(sequence[0])
    if begin % len(sequence) or data[begin : begin + len(sequence)] != sequence:
        raise ConfigError(
            f"sequence parallelism: ranks {sequence} share a replica, and are not neighbours in the group "
            f"{data} that gradients are reduced over: order the ranks of the mpu's "
            "get_sequence_data_parallel_group() by replicas"
        )
    return True


def _experts(engine: Any) -> dict[tuple[int, ...], Workers]:
    if not engine.has_moe_layers:
        return {}
    found = {}
    for name in sorted(engine.expert_data_parallel_group):
        group = engine.expert_data_parallel_group[name]
        found[tuple(ranks_of(group))] = Workers(group)
    return found


def _tied(module: PipelineModule) -> list[tuple[torch.nn.Parameter, Copies]]:
    found = []
    for key in sorted(module.tied_comms):
        comm = module.tied_comms[key]
        copies = Copies(comm["ranks"], comm["group"])
        for attribute in comm["weight_attr"]:
            found.append((module._recursive_getattr(module.tied_modules[key], attribute), copies))
    return found
