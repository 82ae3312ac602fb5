"""Peak memory of tensors on a CPU, to the byte.

The resident set of a process says little: freed blocks stay with the C library, pages appear when they are
first written, threads keep arenas of their own. PyTorch's profiler instead records every block that PyTorch's
CPU allocator hands out and takes back, with its size, its time, and on whichever thread (a collective's
temporaries are made on gloo's threads). Adding them up gives the level over time, the same in every run but
for the moment at which gloo lets go of a finished collective. What the record leaves out: memory that gloo
itself takes with malloc (stock's ring all-reduce has such a buffer, an all-to-all none) and the kernel's
socket buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

MARK = "ds_gradmix reduction"


@dataclass(frozen=True)
class Peak:
    """The peak of the whole call above its beginning, and of the worst marked piece above that piece's."""

    whole_bytes: int
    marked_bytes: int


def marked(function: Callable[..., object]) -> Callable[..., object]:
    """`function`, each of its calls marked in the record as a piece to be looked at by itself."""

    def call(*args: object, **kwargs: object) -> object:
        with record_function(MARK):
            return function(*args, **kwargs)

    return call


def measure(function: Callable[[], object]) -> Peak:
    """Calls `function` and says what it allocated, at the peak and inside its marked pieces."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    pieces = [(event.start_ns(), event.end_ns()) for event in events if event.name() == MARK]
    return Peak(_peak(changes, 0, None), max((_peak(changes, *piece) for piece in pieces), default=0))


def _peak(changes: list[tuple[int, int]], start_ns: int, end_ns: int | None) -> int:
    """The highest sum of changes from `start_ns` on."""
    level = peak = 0
    for time_ns, num_bytes in changes:
        if time_ns >= start_ns and (end_ns is None or time_ns <= end_ns):
            level += num_bytes
            peak = max(peak, level)
    return peak
