"""The one module that communicates: who takes part in what, and the few collectives that the rest is built
from.

Everything a collective is given stays on the device; `Hosts.agree` alone is a conversation between hosts (16
bytes over gloo), which lets a step that differs between ranks end in a message instead of a hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class MismatchError(ValueError):
    """The ranks of a group are about to reduce different gradients."""


class Circle:
    """Ranks that work out something together, of which the first has the last word.

    A sum over ranks is not promised to be bit-identical everywhere, but what they decide by it has to be: the
    first rank takes the sum, decides, and tells the others.

    Args:
        group: the process group, whose backend is the device's; None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    @property
    def is_first(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def sum_at_first(self, values: Tensor) -> None:
        """Sum over the ranks, on the first only; elsewhere `values` is undefined afterwards."""
        dist.reduce(values, self._first, group=self.group)

    def from_first(self, values: Tensor) -> None:
        """The first rank's values, bit for bit, on every rank."""
        dist.broadcast(values, self._first, group=self.group)

    def sum(self, values: Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(values, group=self.group)

    def sum_alike(self, values: Tensor) -> None:
        """Sum over the ranks, in place, and bit for bit the same on every rank."""
        if self.num_ranks > 1:
            self.sum_at_first(values)
            self.from_first(values)

    def all_to_all(self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]) -> None:
        """Give `sent_sizes[j]` elements to rank j, take `out_sizes[j]` from it."""
        dist.all_to_all_single(out, sent, out_sizes, sent_sizes, group=self.group)

    def all_gather(self, out: Tensor, sent: Tensor) -> None:
        """Every rank's `sent`, one after the other, all of one size."""
        dist.all_gather_into_tensor(out, sent, group=self.group)


class Team(NamedTuple):
    """The ranks of one worker, where it has several: neighbours in the group of all workers' ranks.

    A worker's gradient is the mean over its replicas, and each of them the sum over the ranks that share it.
    Ranks of different workers with the same place in their teams exchange with each other.
    """

    inside: Circle  # this worker's ranks
    across: Circle  # those with this rank's place, one of every worker
    num_replicas: int


class Workers(Circle):
    """W data-parallel workers, and this rank's place among them.

    A worker may have parts outside of the group, by tensor parallelism: `deciders` are all ranks that have a
    part of the gradients which this group reduces, so that every part is given the same weights.

    With teams of n ranks an exchange has two levels: inside a team each rank gets the team's gradient for W
    of the R regions, and sends it across to those that combine them. Of a bucket of B bytes a rank sends
    (n-1)/n B inside, and (W-1)/W B/n across.

    Args:
        group: the ranks that reduce the same parameters.
        team: of this rank, if workers have several ranks.
        deciders: these ranks and those that hold other parts of the same gradients; the group itself if None.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, team: Team | None = None, deciders: Circle | None = None
    ) -> None:
        super().__init__(group)
        self.team = team
        self.deciders = deciders or self

    @property
    def ranks_per_worker(self) -> int:
        """n."""
        return 1 if self.team is None else self.team.inside.num_ranks

    @property
    def replicas_per_worker(self) -> int:
        """How many replicas of the model a worker's gradient is the mean of."""
        return 1 if self.team is None else self.team.num_replicas

    @property
    def size(self) -> int:
        """W."""
        return self.num_ranks // self.ranks_per_worker

    @property
    def num_replicas(self) -> int:
        """Of the model, in all workers together."""
        return self.size * self.replicas_per_worker

    @property
    def number(self) -> int:
        """Which of the workers this rank belongs to."""
        return self.rank // self.ranks_per_worker

    @property
    def order(self) -> list[int]:
        """The R ranks as a bucket's regions are sent: by place in the team, then by worker."""
        n = self.ranks_per_worker
        return [rank for place in range(n) for rank in range(place, self.num_ranks, n)]

    def room_for(self, sizes: Sequence[int]) -> int:
        """Elements that `exchange` needs to receive regions of these sizes."""
        n = self.ranks_per_worker
        received = self.size * sizes[self.rank]
        return received if n == 1 else max(received, n * sum(sizes[self.rank % n :: n]))

    def exchange(self, sent: Tensor, sizes: list[int], received: Tensor) -> Tensor:
        """Every worker's gradient for this rank's region, `[W, C]`.

        Args:
            sent: this rank's gradient for all regions, in `order`; undefined afterwards if there are teams.
            sizes: elements of every rank's region, by rank.
            received: memory for `room_for(sizes)` elements, of which the result is a view.
        """
        columns = sizes[self.rank]
        if self.team is None:
            self.all_to_all(received[: self.size * columns], sent, [columns] * self.size, sizes)
        else:
            n = self.ranks_per_worker
            by_place = [sum(sizes[place::n]) for place in range(n)]
            own = sizes[self.rank % n :: n]
            parts = received[: n * sum(own)]
            self.team.inside.all_to_all(parts, sent, [sum(own)] * n, by_place)
            mean = sent[: sum(own)].copy_(_sum(parts.view(n, -1)).div_(self.replicas_per_worker))
            self.team.across.all_to_all(received[: self.size * columns], mean, [columns] * self.size, own)
        return received[: self.size * columns].view(self.size, columns)

    def gather(self, out: Tensor, sent: Tensor) -> None:
        """What every rank sent, all of one size, in `order`."""
        if self.team is None:
            self.all_gather(out, sent)
            return
        row = sent.new_empty(self.size * sent.numel())
        self.team.across.all_gather(row, sent)
        self.team.inside.all_gather(out, row)

    def sum_of_shares(self, values: Tensor) -> None:
        """Sum, in place, over the shares that the deciders have; alike where replicas depend on it."""
        if self.deciders is self:
            self.sum(values)
        else:
            self.deciders.sum_alike(values)


def _sum(values_RC: Tensor) -> Tensor:
    """`[C]`, in float32 whatever travels, and without a copy of all rows in it, as a CPU would make."""
    if values_RC.device.type != "cpu" or values_RC.dtype == torch.float32:
        return values_RC.sum(0, dtype=torch.float32)
    total_C = values_RC[0].float()
    for row_C in values_RC[1:]:
        total_C += row_C
    return total_C


class Copies:
    """A parameter that a few ranks keep: what the first has is copied to the others.

    Args:
        ranks: global ranks, the first of which is the source.
        group: the process group of exactly these.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self._source = ranks[0]
        self._group = group
        self.is_source = dist.get_rank() == self._source

    def copy(self, values: Tensor) -> None:
        """The source's values on every rank, in place."""
        dist.broadcast(values, self._source, group=self._group)


class Hosts:
    """A conversation between the hosts of ranks, over gloo.

    Args:
        group: a gloo group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)

    def agree(self, fingerprint: int, described: Callable[[], list[str]], occasion: str, advice: str) -> None:
        """Check that every rank is at the same point with the same gradients.

        Args:
            fingerprint: a number below 2**63 that tells what this rank is about to do.
            described: the same in words, one for each gradient, for the message.
            occasion: what is being done, for the message.
            advice: what to do about a difference, for the message.

        Raises:
            MismatchError: on every rank, naming the first gradient in which some rank differs from the first.
        """
        if len(self._ranks) == 1:
            return
        largest = self._max(torch.tensor([fingerprint, -fingerprint]))
        if int(largest[0]) != -int(largest[1]):
            raise MismatchError(self._difference(described(), occasion, advice))

    def _max(self, values: Tensor) -> Tensor:
        """Maximum over the ranks in ceil(log2 R) rounds, where gloo's all-reduce, a ring, would take 2 (R-1).

        After round k a rank knows the maximum over 2^k ranks; that some are counted twice does not matter.
        """
        distance = 1
        while distance < len(self._ranks):
            to, origin = (self._ranks[(self._rank + sign * distance) % len(self._ranks)] for sign in (1, -1))
            received = torch.empty_like(values)
            sending = dist.isend(values, to, group=self._group)
            dist.recv(received, origin, group=self._group)
            if sending is not None:
                sending.wait()
            values = torch.maximum(values, received)
            distance *= 2
        return values

    def _difference(self, described: list[str], occasion: str, advice: str) -> str:
        gathered: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(gathered, described, group=self._group)
        ours = gathered[0]
        for rank, theirs in zip(self._ranks, gathered, strict=True):
            for i in range(max(len(theirs), len(ours))):
                here, there = (words[i] if i < len(words) else "nothing" for words in (ours, theirs))
                if here != there:
                    return (
                        f"{occasion}: rank {rank} has {there} where rank {self._ranks[0]} has {here} (number "
                        f"{i}); {advice}"
                    )
        return f"{occasion}: the ranks are at different points of the step"


def gather_objects(value: object) -> list[Any]:
    """One small object from every rank of the world, in order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


_GROUPS: dict[tuple[Any, ...], dist.ProcessGroup] = {}


def groups_of(sets: Iterable[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup:
    """A process group for every set of ranks, which all ranks give alike; the one this rank is in.

    Engines share them: a group has threads, and on a GPU memory, of its own, which torch frees at the end.
    """
    from deepspeed.constants import default_pg_timeout  # what DEEPSPEED_TIMEOUT says

    key = (dist.group.WORLD, backend, tuple(map(tuple, sets)))
    if key not in _GROUPS:
        for old in [old for old in _GROUPS if old[0] is not key[0]]:  # of a world that is gone
            del _GROUPS[old]
        for ranks in key[2]:
            group = dist.new_group(list(ranks), backend=backend, timeout=default_pg_timeout)
            if dist.get_rank() in ranks:
                _GROUPS[key] = group
    return _GROUPS[key]


def fingerprint_of(described: Sequence[str]) -> int:
    """A number below 2**63 for a list of words, the same in every process."""
    digest = hashlib.blake2b("\n".join(described).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
