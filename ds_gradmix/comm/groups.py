"""Process groups, and the few collectives that everything else is built from; tensors stay on the device."""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic:
    """Counts the bytes that this rank has given to collectives for other ranks, in all engines."""

    def __init__(self) -> None:
        self.bytes_sent = 0.0

    def add(self, num_bytes: float) -> None:
        """Note that so many are sent."""
        self.bytes_sent += num_bytes


TRAFFIC = Traffic()


class RankGroup:
    """The ranks of a process group of the device's backend, None for the default group; the first decides.

    A sum over ranks is not promised to be bit-identical everywhere, but what is decided by it has to be: the
    first rank takes the sum, decides, and sends the decision to the others.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.ranks = ranks_of(dist.group.WORLD if group is None else group)
        self.num_ranks = len(self.ranks)
        self.rank = dist.get_rank(group)
        self._is_gloo = "gloo" in dist.get_backend(group)

    @property
    def is_first(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def reduce(self, values: Tensor) -> None:
        """Sum over the ranks, on the first only; elsewhere `values` is undefined afterwards."""
        TRAFFIC.add(0 if self.is_first else values.nbytes)
        dist.reduce(values, self.ranks[0], group=self.group)

    def broadcast(self, values: Tensor) -> None:
        """The first rank's values, bit for bit, on every rank."""
        TRAFFIC.add(values.nbytes if self.is_first else 0)
        dist.broadcast(values, self.ranks[0], group=self.group)

    def all_reduce(self, values: Tensor) -> None:
        """Sum over the ranks, in place."""
        TRAFFIC.add(2 * (self.num_ranks - 1) / self.num_ranks * values.nbytes)
        dist.all_reduce(values, group=self.group)

    def all_reduce_batched(self, tensors: Sequence[Tensor], max_bytes: int) -> None:
        """Sum each of many tensors over the ranks, in place, in batches of about `max_bytes`."""
        batch: list[Tensor] = []
        for tensor, following in zip_longest(tensors, tensors[1:]):
            batch.append(tensor)
            same_dtype = following is not None and following.dtype == tensor.dtype
            if same_dtype and sum(other.nbytes for other in batch) < max_bytes:
                continue
            flat_N = torch.cat([other.reshape(-1) for other in batch])
            self.all_reduce(flat_N)
            for other, part in zip(batch, flat_N.split([other.numel() for other in batch]), strict=True):
                other.copy_(part.view_as(other))
            batch = []

    def all_reduce_identical(self, values: Tensor) -> None:
        """Sum over the ranks, in place, and bit for bit the same on every rank."""
        if self.num_ranks > 1:
            self.reduce(values)
            self.broadcast(values)

    def all_to_all(self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]) -> None:
        """Give `sent_sizes[j]` elements to rank j, take `out_sizes[j]` from it."""
        self.begin_all_to_all(out, sent, out_sizes, sent_sizes)()

    def begin_all_to_all(
        self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]
    ) -> Callable[[], object]:
        """The same without waiting for it; what is returned waits.

        On gloo by messages, whose receivers are ready before anything is sent: in gloo's own all-to-all the
        word that they are waits behind the data of the other direction, which takes 1.4 times as long.
        """
        TRAFFIC.add((sent.numel() - sent_sizes[self.rank]) * sent.itemsize)
        if not self._is_gloo or out.device.type != "cpu":
            work = dist.all_to_all_single(out, sent, out_sizes, sent_sizes, group=self.group, async_op=True)
            return work.wait  # type: ignore[no-any-return]
        parts, incoming = sent.split(sent_sizes), out.split(out_sizes)
        others = [*range(self.rank + 1, self.num_ranks), *range(self.rank)]
        works = [
            dist.irecv(incoming[j], self.ranks[j], self.group) for j in reversed(others) if out_sizes[j] > 0
        ]
        works += [dist.isend(parts[j], self.ranks[j], self.group) for j in others if sent_sizes[j] > 0]
        incoming[self.rank].copy_(parts[self.rank])
        return lambda: [work.wait() for work in works if work is not None]

    def all_gather(self, out: Tensor, sent: Tensor) -> None:
        """Every rank's `sent`, one after the other, all of one size."""
        TRAFFIC.add((self.num_ranks - 1) * sent.nbytes)
        dist.all_gather_into_tensor(out, sent, group=self.group)


class TiedParameter:
    """A parameter that the global ranks of a process group keep; its gradient is copied from the first."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self._source, self._group = ranks[0], group
        self.is_source = dist.get_rank() == self._source

    def copy(self, values: Tensor) -> None:
        """The source's values on every rank, in place."""
        dist.broadcast(values, self._source, group=self._group)


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The global ranks of a process group; this one alone if there is no group."""
    return (dist.get_rank(),) if group is None else tuple(dist.get_process_group_ranks(group))


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One small object from every rank of a group, by default of the world, in order."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


_GROUPS: dict[tuple[Any, ...], dist.ProcessGroup] = {}


def group_of(sets: Iterable[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup:
    """Make a process group of every set of ranks, and return the one that this rank is in.

    All ranks must call this with the same sets. Engines share groups: each has threads, and on a GPU memory,
    of its own, which torch frees at the end. Collectives of a group wait as long as DEEPSPEED_TIMEOUT says,
    in minutes, as DeepSpeed's own do.
    """
    key = (dist.group.WORLD, backend, tuple(map(tuple, sets)))
    if key not in _GROUPS:
        for old in [old for old in _GROUPS if old[0] is not key[0]]:  # of a world that is gone
            del _GROUPS[old]
        timeout = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))
        for ranks in key[2]:
            group = dist.new_group(list(ranks), backend=backend, timeout=timeout)
            if dist.get_rank() in ranks:
                _GROUPS[key] = group
    return _GROUPS[key]
