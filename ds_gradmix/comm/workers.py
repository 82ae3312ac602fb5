"""The data-parallel workers whose gradients the rules combine, and how these travel between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_gradmix.comm.consistency import ConsistencyCheck
from ds_gradmix.comm.groups import RankGroup, TiedParameter


class WorkerLevels(NamedTuple):
    """The ranks of one worker, where it has several: neighbours in the group of all workers' ranks.

    A worker's gradient is the mean over its replicas of the model, and each of these the sum over the ranks
    that share it. Ranks of different workers with the same place in their workers exchange with each other.
    """

    intra: RankGroup  # this worker's ranks
    inter: RankGroup  # the ranks with this rank's place, one of every worker
    num_replicas: int  # in one worker


class WorkerGroup(RankGroup):
    """W data-parallel workers, and this rank's place among them.

    With n ranks a worker an exchange has two levels: inside a worker each rank gets the worker's gradient for
    W of the R regions of a bucket, and sends it to the ranks that combine them. Of a bucket of B bytes a rank
    sends (n-1)/n B inside, and (W-1)/W B/n between workers.

    Args:
        group: the ranks that reduce the same parameters.
        levels: of this rank, if workers have several ranks.
        decision_group: these ranks and those that hold other parts of the same gradients, by tensor
            parallelism, so that every part is given the same weights; the group itself if None.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        levels: WorkerLevels | None = None,
        decision_group: RankGroup | None = None,
    ) -> None:
        super().__init__(group)
        self._split(levels, decision_group)

    def _split(self, levels: WorkerLevels | None, decision_group: RankGroup | None) -> None:
        self.levels = levels
        self.intra = levels and levels.intra
        self.inter: RankGroup = levels.inter if levels else self
        self.decision_group = decision_group or self
        self.ranks_per_worker = levels.intra.num_ranks if levels else 1  # n
        self.replicas_per_worker = levels.num_replicas if levels else 1
        self.size = self.num_ranks // self.ranks_per_worker  # W
        self.number = self.rank // self.ranks_per_worker  # of the worker that this rank belongs to

    @property
    def num_replicas(self) -> int:
        """Replicas of the model in all workers together."""
        return self.size * self.replicas_per_worker

    @property
    def order(self) -> list[int]:
        """The R ranks as a bucket's regions are sent: by place in the worker, then by worker."""
        n = self.ranks_per_worker
        return [rank for place in range(n) for rank in range(place, self.num_ranks, n)]

    def receive_size(self, sizes: Sequence[int]) -> int:
        """Elements that `exchange` needs to receive regions of these sizes."""
        n = self.ranks_per_worker
        received = self.size * sizes[self.rank]
        return received if n == 1 else max(received, n * sum(sizes[self.rank % n :: n]))

    def exchange(self, sent: Tensor, sizes: list[int], received: Tensor) -> Tensor:
        """Every worker's gradient for this rank's region, `[W, C]`.

        Args:
            sent: this rank's gradient for all regions, in `order`; undefined afterwards if workers have
                several ranks.
            sizes: elements of every rank's region, by rank.
            received: memory for `receive_size(sizes)` elements, of which the result is a view.
        """
        columns = sizes[self.rank]
        if self.intra is None:
            self.all_to_all(received[: self.size * columns], sent, [columns] * self.size, sizes)
        else:
            n = self.ranks_per_worker
            by_place = [sum(sizes[place::n]) for place in range(n)]
            own = sizes[self.rank % n :: n]
            parts = received[: n * sum(own)]
            self.intra.all_to_all(parts, sent, [sum(own)] * n, by_place)
            mean = sent[: sum(own)].copy_(_sum(parts.view(n, -1)).div_(self.replicas_per_worker))
            self.inter.all_to_all(received[: self.size * columns], mean, [columns] * self.size, own)
        return received[: self.size * columns].view(self.size, columns)

    def gather(self, out: Tensor, sent: Tensor) -> None:
        """What every rank sent, all of one size, in `order`."""
        if self.intra is None:
            self.all_gather(out, sent)
            return
        row = sent.new_empty(self.size * sent.numel())
        self.inter.all_gather(row, sent)
        self.intra.all_gather(out, row)

    def sum_over_shares(self, values: Tensor) -> None:
        """Sum, in place, over the ranks that have shares of the same gradients; identical on all of them
        where replicas depend on it.
        """
        if self.decision_group is self:
            self.all_reduce(values)
        else:
            self.decision_group.all_reduce_identical(values)


def _sum(values_RC: Tensor) -> Tensor:
    """`[C]`, in float32 whatever travels, and without a copy of all rows in it, as a CPU would make."""
    if values_RC.device.type != "cpu" or values_RC.dtype == torch.float32:
        return values_RC.sum(0, dtype=torch.float32)
    total_C = values_RC[0].float()
    for row_C in values_RC[1:]:
        total_C += row_C
    return total_C


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of ranks that this rank reduces, decides and shares parameters with.

    Args:
        workers: the data-parallel replicas of what this rank holds; their `decision_group` is these and
            their tensor-parallel parts.
        model: all ranks with a part of the same model, pipeline stages included.
        consistency: compares what the ranks of the decision group are about to do.
        tensor: the tensor-parallel ranks, None if there is one.
        sequence: the ranks that share one replica's sequences, None if there is one.
        sum_sequence_ranks: whether these are not in the group that DeepSpeed reduces over, so that nobody
            adds up their gradients.
        experts: workers by the ranks of an expert data-parallel group.
        tied: parameters that several pipeline stages keep, in an order that all of them follow.
        is_pipeline: whether the model is a PipelineModule.
    """

    workers: WorkerGroup
    model: RankGroup
    consistency: ConsistencyCheck
    tensor: RankGroup | None
    sequence: RankGroup | None
    sum_sequence_ranks: bool
    experts: Mapping[tuple[int, ...], WorkerGroup]
    tied: Sequence[tuple[torch.nn.Parameter, TiedParameter]]
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

    @property
    def decisions_are_global(self) -> bool:
        """Whether the workers take part in every decision on the model, and so know them all."""
        return not self.experts and self.model.num_ranks == self.workers.num_ranks

    def describe(self) -> str:
        """What a worker is made of, and how a replica is divided, in words; nothing if it is not."""
        found = []
        if self.workers.replicas_per_worker > 1:
            found.append(f"each the mean of {self.workers.replicas_per_worker} replicas")
        if self.tensor is not None:
            found.append(f"tensor parallel {self.tensor.num_ranks}")
        if self.is_pipeline:
            found.append(f"pipeline of {self.model.num_ranks // self.workers.decision_group.num_ranks}")
        if self.sequence is not None:
            found.append(f"sequence parallel {self.sequence.num_ranks}")
        if self.experts:
            sizes = sorted(self.workers.size // workers.size for workers in self.experts.values())
            found.append(f"expert parallel {', '.join(map(str, sizes))}")
        return "".join(f", {words}" for words in found)
