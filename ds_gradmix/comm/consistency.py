"""A check that all ranks are at the same point, by 16 bytes over gloo: ranks that differ raise, not hang."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from ds_gradmix.comm.groups import gather_objects

_FINGERPRINTS_KEPT = 4096


class MismatchError(ValueError):
    """The ranks of a group are about to reduce different gradients."""


class ConsistencyCheck:
    """Compares what the ranks of a gloo group are about to do, without waiting for the device."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self._fingerprints: dict[tuple[str, Hashable], int] = {}

    def check_equal(self, value: Hashable, words: Callable[[], list[str]], doing: str, advice: str) -> None:
        """Check that every rank is about to do the same.

        Args:
            value: what this rank is about to do; `words` describes it, by a string for each gradient.
            doing: what the ranks do, for the message, which ends with `advice`.

        Raises:
            MismatchError: on every rank, naming the first gradient in which some rank differs from the first.
        """
        if len(self._ranks) == 1:
            return
        key = (doing, value)
        if key not in self._fingerprints:
            if len(self._fingerprints) > _FINGERPRINTS_KEPT:
                self._fingerprints.clear()
            self._fingerprints[key] = fingerprint_of([doing, *words()])
        fingerprint = self._fingerprints[key]
        largest = self._max(torch.tensor([fingerprint, -fingerprint]))
        if int(largest[0]) != -int(largest[1]):
            raise MismatchError(self._difference(words(), doing, advice))

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

    def _difference(self, words: list[str], doing: str, advice: str) -> str:
        gathered, first = gather_objects(words, self._group), self._ranks[0]
        for rank, theirs in zip(self._ranks, gathered, strict=True):
            for i, (here, there) in enumerate(zip_longest(gathered[0], theirs, fillvalue="nothing")):
                if here != there:
                    where = f"rank {rank} has {there} where rank {first} has {here} (number {i})"
                    return f"{doing}: {where}; {advice}"
        return f"{doing}: the ranks are at different points of the step"


def fingerprint_of(words: Sequence[str]) -> int:
    """A number below 2**63 that is the same for the same words in every process."""
    digest = hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
