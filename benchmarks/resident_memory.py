"""Peak memory of a block of code, by the high-water mark of this process's resident set.

Linux maintains the mark (VmHWM) and resets it to the current size on request (clear_refs). It measures memory
in use only if freed memory returns to the system at once, which malloc prevents where it keeps freed blocks
for later. So call `map_every_block` before the first large allocation, and measure times separately, after
`map_as_usual`.

Repeated measurements differ by about 0.2 MiB. Memory that the collective library allocates counts as tensors
do, and so do the tensors of a finished collective while a thread of the library still refers to them. The
kernel's socket buffers do not count. (PyTorch's profiler counts tensors alone, and misses the release of one
whose last reference is held by a thread of gloo.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PROCESS = Path("/proc/self")
_libc = ctypes.CDLL(None)


def map_every_block() -> None:
    """Make malloc map each block of 64 KiB or more separately, and unmap it when it is freed."""
    _libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)


def map_as_usual() -> None:
    """Set malloc's thresholds to the values that they take by default after blocks of many MiB."""
    _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    _libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


class Watch:
    """`with watch:` measures the peak of a block, and in it of the calls of each `watch.call(function)`.

    Attributes, both relative to the size at the respective start:
        block_bytes: the peak of the block.
        call_bytes: the highest peak of a call.
    """

    def __init__(self) -> None:
        self.block_bytes = self.call_bytes = self._start = 0

    def __enter__(self) -> Watch:
        self._start, self.block_bytes, self.call_bytes = self._reset(), 0, 0
        return self

    def __exit__(self, *_: object) -> None:
        self._record()

    def call(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function with each of its calls measured."""

        def measured(*args: object, **kwargs: object) -> object:
            self._record()
            start = self._reset()
            result = function(*args, **kwargs)
            self.call_bytes = max(self.call_bytes, self._record() - start)
            return result

        return measured

    def _record(self) -> int:
        """Read the high-water mark, and record it for the block before a call resets it."""
        mark = _status_bytes("VmHWM")
        self.block_bytes = max(self.block_bytes, mark - self._start)
        return mark

    def _reset(self) -> int:
        """Reset the high-water mark; returns the current size."""
        _libc.malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
        return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_PROCESS}/status has no {field}")
