"""What `DeepSpeedZeroOptimizer.average_tensor` asks for when it reduces a bucket, recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.exchange.bucket import ParamSpan
from ds_gradmix.exchange.plan import Piece


class OwnedSlice(NamedTuple):
    """A part of a bucket that one rank owns."""

    start: int  # in the bucket
    length: int
    owner: int  # rank in the process group that reduces it
    output: Tensor | None  # what the owner adds the result to, in float32


class ReduceCall(NamedTuple):
    """A reduction as DeepSpeed asked for it."""

    slices: list[OwnedSlice]
    group: Any
    replay: Callable[[], None]


@dataclass
class RecordedBucket:
    """The calls for one bucket, which is complete when their slices add up to it."""

    flat_N: Tensor
    spans: tuple[ParamSpan, ...]
    comm_dtype: torch.dtype
    calls: list[ReduceCall] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all of the bucket is recorded."""
        recorded = sum(part.length for call in self.calls for part in call.slices)
        return recorded == self.flat_N.numel()


def pieces_of(optimizer: Any, slices: Sequence[OwnedSlice], spans: Sequence[ParamSpan]) -> list[Piece]:
    """Where the borders of gradients and of owners' slices cut a bucket of a `DeepSpeedZeroOptimizer`."""
    pieces, remaining = [], iter(slices)
    first, length, owner, _ = next(remaining, OwnedSlice(0, 0, 0, None))
    for param, span in enumerate(spans):
        groups = optimizer.param_to_partition_ids.items()
        group = next(i for i, parameters in groups if span.param in parameters)
        start, end = span.start, span.start + span.length
        while start < end:
            while first + length <= start:
                first, length, owner, _ = next(remaining)
            part = min(first + length, end) - start
            offset = optimizer.grad_partition_insertion_offset[group][owner][span.param]
            offset += start - span.start - optimizer.grad_start_offset[group][owner][span.param]
            pieces.append(Piece(start, part, owner, param, group, int(offset)))
            start += part
    return pieces
