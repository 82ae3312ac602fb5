"""The data-parallel workers whose gradients the rules combine, and the collectives between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_gradmix.comm.consistency import ConsistencyCheck
from ds_gradmix.comm.groups import RankGroup, TiedParameter

Merge = Callable[[Tensor], Tensor]  # of `[R, C]` to `[C]`


class WorkerLevels(NamedTuple):
    """The ranks of a worker that has several, which are neighbours in the group of all workers' ranks.

    A worker's gradient is the mean over its replicas of the model, and each of these the sum over the ranks
    that share it. Ranks with the same place in their workers exchange with each other.
    """

    intra: RankGroup  # this worker's ranks
    inter: RankGroup  # the ranks with this rank's place, one of every worker
    num_replicas: int  # in one worker


class WorkerGroup(RankGroup):
    """W data-parallel workers of the R ranks in `group`, which reduce the same parameters.

    With n ranks a worker an exchange has two levels: inside a worker each rank gets the worker's gradient for
    W of the R regions of a bucket, and sends it to the ranks that combine them. Of a bucket of B bytes a rank
    sends (n-1)/n B inside, and (W-1)/W B/n between workers. `decision_group` has these ranks and those with
    other parts of the same gradients, by tensor parallelism, so that all parts are given the same weights.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        levels: WorkerLevels | None = None,
        decision_group: RankGroup | None = None,
        node_levels: WorkerLevels | None = None,
    ) -> None:
        super().__init__(group)
        self._split(levels, decision_group, node_levels)

    def _split(
        self,
        levels: WorkerLevels | None,
        decision_group: RankGroup | None,
        node_levels: WorkerLevels | None = None,
    ) -> None:
        self.levels = levels  # None where a worker is one rank
        self.decision_group = decision_group or self
        self.ranks_per_worker = levels.intra.num_ranks if levels else 1  # n
        self.replicas_per_worker = levels.num_replicas if levels else 1
        self.size = self.num_ranks // self.ranks_per_worker  # W
        self.number = self.rank // self.ranks_per_worker  # of the worker that this rank belongs to
        self._node_levels = node_levels

    def by_node(self) -> "WorkerGroup | None":
        """The same ranks with nodes for workers, so that gradients are summed inside of nodes first; None
        where nodes are not known, or hold one rank or all of them.
        """
        return None if self._node_levels is None else WorkerGroup(self.group, self._node_levels)

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
        return max(self.size * sizes[self.rank], n * sum(sizes[self.rank % n :: n]) if n > 1 else 0)

    def exchange(self, sent: Tensor, sizes: list[int], received: Tensor) -> Tensor:
        """Every worker's gradient for this rank's region, `[W, C]`.

        Args:
            sent: this rank's gradient for all regions, in `order`; undefined afterwards if workers have
                several ranks.
            sizes: elements of every rank's region, by rank.
            received: memory for `receive_size(sizes)` elements, of which the result is a view.
        """
        return self.begin_exchange(sent, sizes, received)()

    def begin_exchange(
        self, sent: Tensor, sizes: list[int], received: Tensor, merge: Merge | None = None
    ) -> Callable[[], Tensor]:
        """The same in two parts: inside workers it is under way at once, and between them when what is
        returned is called. `merge` makes one row of those of a worker's ranks, in place of their mean.
        """
        columns, inter = sizes[self.rank], self.levels.inter if self.levels else self
        wait, n = None, self.ranks_per_worker
        if self.levels is not None:
            by_place, sizes = [sum(sizes[place::n]) for place in range(n)], sizes[self.rank % n :: n]
            parts = received[: n * sum(sizes)]
            wait = self.levels.intra.begin_all_to_all(parts, sent, [sum(sizes)] * n, by_place)

        def finish() -> Tensor:
            own = sent
            if wait is not None:
                wait()
                rows = parts.view(n, -1)
                merged = sum_rows(rows, self.replicas_per_worker) if merge is None else merge(rows)
                own = sent[: sum(sizes)].copy_(merged)
            result = received[: self.size * columns]
            inter.all_to_all(result, own, [columns] * self.size, sizes)
            return result.view(self.size, columns)

        return finish

    def gather(self, out: Tensor, sent: Tensor) -> None:
        """What every rank sent, all of one size, in `order`."""
        if self.levels is None:
            self.all_gather(out, sent)
        else:
            row = sent.new_empty(self.size * sent.numel())
            self.levels.inter.all_gather(row, sent)
            self.levels.intra.all_gather(out, row)

    def sum_over_shares(self, values: Tensor) -> None:
        """Sum in place over all ranks with shares of the same gradients; bit-identical if tensor-parallel."""
        if self.decision_group is self:
            self.all_reduce(values)
        else:
            self.decision_group.all_reduce_identical(values)


def sum_rows(values_RC: Tensor, divisor: int = 1) -> Tensor:
    """The sum of the rows by a divisor, in float32, on a CPU without converting a copy of all rows first."""
    if values_RC.device.type != "cpu" or values_RC.dtype == torch.float32:
        total_C = values_RC.sum(0, dtype=torch.float32)
    else:
        total_C = values_RC[0].float()
        for row_C in values_RC[1:]:
            total_C += row_C
    return total_C if divisor == 1 else total_C.div_(divisor)


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of ranks that this rank reduces, decides and shares parameters with."""

    workers: WorkerGroup  # the data-parallel replicas of what this rank holds
    model: RankGroup  # all ranks with a part of the same model, pipeline stages included
    consistency: ConsistencyCheck  # of the ranks of the decision group
    tensor: RankGroup | None  # the tensor-parallel ranks, None if there is one
    sequence: RankGroup | None  # the ranks that share one replica's sequences, None if there is one
    sum_sequence_ranks: bool  # they are not in the group that DeepSpeed reduces over
    experts: Mapping[tuple[int, ...], WorkerGroup]  # by the ranks of an expert data-parallel group
    tied: Sequence[tuple[torch.nn.Parameter, TiedParameter]]  # on several stages, in the same order on each
    is_pipeline: bool  # the model is a PipelineModule

    @property
    def decisions_are_global(self) -> bool:
        """Whether the workers take part in every decision on the model, and so know them all."""
        return not self.experts and self.model.num_ranks == self.workers.num_ranks

    def describe(self) -> str:
        """What a worker is made of, and how a replica is divided; empty if neither."""
        workers, found = self.workers, []
        if workers.replicas_per_worker > 1:
            found.append(f"each the mean of {workers.replicas_per_worker} replicas")
        if self.tensor is not None:
            found.append(f"tensor parallel {self.tensor.num_ranks}")
        if self.is_pipeline:
            found.append(f"pipeline of {self.model.num_ranks // workers.decision_group.num_ranks}")
        if self.sequence is not None:
            found.append(f"sequence parallel {self.sequence.num_ranks}")
        if self.experts:
            sizes = sorted(workers.size // replicas.size for replicas in self.experts.values())
            found.append(f"expert parallel {', '.join(map(str, sizes))}")
        return "".join(f", {words}" for words in found)
