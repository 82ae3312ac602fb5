"""Whether all ranks are at the same point: 16 bytes between hosts, over gloo, which turn ranks that differ
into a message instead of a hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FINGERPRINTS_KEPT = 4096


class MismatchError(ValueError):
    """The ranks of a group are about to reduce different gradients."""


class ConsistencyCheck:
    """Compares what the ranks of a group are about to do, without waiting for the device.

    Args:
        group: a gloo group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self._fingerprints: dict[tuple[str, Hashable], int] = {}

    def check_equal(
        self, value: Hashable, described: Callable[[], list[str]], occasion: str, advice: str
    ) -> None:
        """Check that every rank is at the same point with the same gradients.

        Args:
            value: what this rank is about to do; its words are asked for once.
            described: the same in words, one for each gradient, which are compared.
            occasion: what is being done, for the message.
            advice: what to do about a difference, for the message.

        Raises:
            MismatchError: on every rank, naming the first gradient in which some rank differs from the first.
        """
        if len(self._ranks) == 1:
            return
        key = (occasion, value)
        if key not in self._fingerprints:
            if len(self._fingerprints) > _FINGERPRINTS_KEPT:
                self._fingerprints.clear()
            self._fingerprints[key] = fingerprint_of([occasion, *described()])
        fingerprint = self._fingerprints[key]
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


def fingerprint_of(described: Sequence[str]) -> int:
    """A number below 2**63 for a list of words, the same in every process."""
    digest = hashlib.blake2b("\n".join(described).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
