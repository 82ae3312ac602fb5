"""Peak memory of a piece of work, by the operating system's high-water mark of this process' resident set.

Linux keeps the mark (VmHWM) and sets it back to the present size on request (clear_refs). For it to say how
much was in use, a freed block must leave the process at once, and it does not if malloc keeps it: a later
block is then as likely to grow into other free pages as into the same. So call `map_every_block` before the
first large block is ever allocated, and measure times in another phase, after `map_as_usual`.

Repeats agree to about 0.2 MiB. What the collective library takes with malloc counts, like tensors, and so do
a finished collective's tensors as long as one of its threads holds on to them. The kernel's socket buffers do
not count. (PyTorch's profiler counts tensors alone, but misses the return of a block that a thread of gloo is
the last to hold.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PROCESS = Path("/proc/self")
_libc = ctypes.CDLL(None)


def map_every_block() -> None:
    """From here on malloc maps each block of 64 KiB or more by itself, and unmaps it when freed."""
    _libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)


def map_as_usual() -> None:
    """Malloc's thresholds as they end up by themselves in a process with blocks of many MiB."""
    _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    _libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


class Watch:
    """`with watch:` measures the block, and in it the worst call of each `watch.piece(function)`.

    Attributes, both in bytes and above the size at the respective beginning:
        whole_bytes: the block's peak.
        piece_bytes: the highest peak of a piece.
    """

    def __init__(self) -> None:
        self.whole_bytes = self.piece_bytes = self._start = 0

    def __enter__(self) -> Watch:
        self._start, self.whole_bytes, self.piece_bytes = self._restart(), 0, 0
        return self

    def __exit__(self, *_: object) -> None:
        self._note()

    def piece(self, function: Callable[..., object]) -> Callable[..., object]:
        """`function`, each of its calls measured by itself too."""

        def call(*args: object, **kwargs: object) -> object:
            self._note()
            start = self._restart()
            result = function(*args, **kwargs)
            self.piece_bytes = max(self.piece_bytes, self._note() - start)
            return result

        return call

    def _note(self) -> int:
        """The high-water mark, also taken note of for the whole, since the next piece sets it back."""
        mark = _status_bytes("VmHWM")
        self.whole_bytes = max(self.whole_bytes, mark - self._start)
        return mark

    def _restart(self) -> int:
        _libc.malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
        return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_PROCESS}/status has no {field}")
