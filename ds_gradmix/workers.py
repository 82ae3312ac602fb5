"""The one module that communicates: a data-parallel group, and the few collectives that the rest is built
from.

Everything a collective is given stays on the device; `agree` alone is a conversation between hosts (16 bytes
over gloo), which lets a step that differs between ranks end in a message instead of a hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class MismatchError(ValueError):
    """The ranks of a group are about to reduce different gradients."""


class Workers:
    """W data-parallel replicas, of which this process is number `rank`.

    Args:
        group: the data-parallel process group, whose backend moves gradients; None for the default group.
        hosts: a gloo group of the same ranks, for `agree`.
    """

    def __init__(self, group: dist.ProcessGroup | None, hosts: dist.ProcessGroup | None) -> None:
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._group = group
        self._hosts = hosts
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    def all_to_all(self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]) -> None:
        """Give `sent_sizes[j]` elements to rank j, take `out_sizes[j]` from it."""
        dist.all_to_all_single(out, sent, out_sizes, sent_sizes, group=self._group)

    def sum_at_first(self, values: Tensor) -> None:
        """Sum over the group, on its first rank only; elsewhere `values` is undefined afterwards."""
        dist.reduce(values, self._first, group=self._group)

    def from_first(self, values: Tensor) -> None:
        """The first rank's values, bit for bit, on every rank."""
        dist.broadcast(values, self._first, group=self._group)

    def sum(self, values: Tensor) -> None:
        """Sum over the group, in place."""
        dist.all_reduce(values, group=self._group)

    def gather(self, value: Tensor) -> Tensor:
        """One number from every rank, `[W]`."""
        out = value.new_empty(self.size)
        dist.all_gather_into_tensor(out, value.view(1), group=self._group)
        return out

    def agree(self, fingerprint: int, described: Callable[[], list[str]], occasion: str, advice: str) -> None:
        """Check that every rank is at the same point with the same gradients.

        Args:
            fingerprint: a number below 2**63 that tells what this rank is about to do.
            described: the same in words, one for each gradient, for the message.
            occasion: what is being done, for the message.
            advice: what to do about a difference, for the message.

        Raises:
            MismatchError: on every rank, naming the first gradient in which some rank differs from rank 0.
        """
        largest = self._max_over_hosts(torch.tensor([fingerprint, -fingerprint]))
        if int(largest[0]) != -int(largest[1]):
            raise MismatchError(self._difference(described(), occasion, advice))

    def _max_over_hosts(self, values: Tensor) -> Tensor:
        """Maximum over the ranks in ceil(log2 W) rounds, where gloo's all-reduce, a ring, would take 2 (W-1).

        After round k a rank knows the maximum over 2^k ranks; that some are counted twice does not matter.
        """
        everyone = dist.get_process_group_ranks(self._hosts)
        distance = 1
        while distance < self.size:
            to, origin = (everyone[(self.rank + sign * distance) % self.size] for sign in (1, -1))
            received = torch.empty_like(values)
            sending = dist.isend(values, to, group=self._hosts)
            dist.recv(received, origin, group=self._hosts)
            if sending is not None:
                sending.wait()
            values = torch.maximum(values, received)
            distance *= 2
        return values

    def _difference(self, described: list[str], occasion: str, advice: str) -> str:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, described, group=self._hosts)
        for rank, other in enumerate(gathered):
            for i in range(max(len(other), len(gathered[0]))):
                ours, theirs = (words[i] if i < len(words) else "nothing" for words in (gathered[0], other))
                if ours != theirs:
                    return (
                        f"{occasion}: worker {rank} has {theirs} where worker 0 has {ours} (number {i}); "
                        f"{advice}"
                    )
        return f"{occasion}: the workers are at different points of the step"


def fingerprint_of(described: Sequence[str]) -> int:
    """A number below 2**63 for a list of words, the same in every process."""
    digest = hashlib.blake2b("\n".join(described).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
