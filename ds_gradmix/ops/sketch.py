"""A random linear map to m numbers that keeps inner products: `E <S a, S b> = <a, b>`.

A vector of N > m elements is cut into blocks of m. Each block is multiplied by one vector of random signs,
which all blocks share, and by a sign of its own, rotated by a random shift of its own, and added up:

    (S x)[(j + shift_b) mod m] = sum_b sign_b signs[j] x[b m + j]

Without the shifts an element would meet the same places of all other blocks with the same sign, and what
blocks have in common would be error. The standard error of a cosine is about `(1 - cos^2)/sqrt(m)`, whatever
N. NaN and Inf stay visible. A vector of N <= m elements is kept as it is, so its inner products are exact.

Sums are in float32. On a GPU one kernel (kernels/sketch.py) reads each element once, in its own dtype; on a
CPU the m sums are taken in parts that stay in cache, with one multiplication and addition a block and part.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ds_gradmix.ops import kernels
from ds_gradmix.ops.segments import to_device

_STREAM = 2**32  # of a step's random draws, and the next one; rules use small numbers
_CACHED_SUMS = 1 << 17  # float32 that a core's cache holds beside what is added to them
COSINE_ERROR = 1.2  # an upper limit of a cosine's standard error, times sqrt(m)


class SketchMaps:
    """The maps of one step, for vectors of any length: they share the signs.

    Args:
        size: m, the most numbers of a sketch.
        generator: of the step's random draws, by stream (`RngKey.generator`).
        device: where vectors and sketches are.
    """

    def __init__(
        self, size: int, generator: Callable[[int], np.random.Generator], device: torch.device
    ) -> None:
        self._size = size
        self._generator = generator
        bits = generator(_STREAM).integers(0, 256, -(-size // 8), dtype=np.uint8)
        if device.type == "cpu":
            bits_M = torch.from_numpy(np.unpackbits(bits, bitorder="little"))
        else:
            places_K = torch.arange(8, dtype=torch.uint8, device=device)
            bits_MK = to_device(torch.from_numpy(bits), device)[:, None].bitwise_right_shift(places_K)
            bits_M = (bits_MK & 1).flatten()
        self._signs_M = bits_M[:size].float().mul_(2).sub_(1)

    def of_length(self, length: int) -> "Sketch":
        """The map for vectors of that length."""
        return Sketch(self._size, length, self._signs_M, self._generator(_STREAM + 1))


class Sketch:
    """The map for vectors of one length N, to min(m, N) numbers."""

    def __init__(self, size: int, length: int, signs_M: Tensor, random: np.random.Generator) -> None:
        self.size = min(size, length)
        self.is_exact = length <= size
        self._signs_M = signs_M
        num_blocks = 0 if self.is_exact else -(-length // size)
        self._shifts = random.integers(0, size, num_blocks).tolist()
        self._block_signs = (2.0 * random.integers(0, 2, num_blocks) - 1.0).tolist()
        self._on_device: tuple[Tensor, Tensor] | None = None  # these two, for a kernel

    def of(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """The sketch of a vector that is given in flat parts, in any dtype, to `out`, `[size]` float32."""
        if self.is_exact:
            torch.cat([part.float() for part in parts], out=out)
            return
        out.zero_()
        add = self._add_in_one_launch if kernels.available(out.device) else self._add
        begin = 0
        for part in parts:
            add(part, begin, out)
            begin += part.numel()

    def _add(self, part: Tensor, begin: int, out: Tensor) -> None:
        for place, first, source, length, sign in self._pieces(begin, part.numel(), out.device):
            signs = self._signs_M.narrow(0, source, length)
            out.narrow(0, place, length).addcmul_(part.narrow(0, first, length), signs, value=sign)

    def _add_in_one_launch(self, part: Tensor, begin: int, out: Tensor) -> None:
        from ds_gradmix.ops.kernels.sketch import add_to_sketch

        if self._on_device is None:
            shifts_B = to_device(torch.tensor(self._shifts, dtype=torch.int32), out.device)
            self._on_device = shifts_B, to_device(torch.tensor(self._block_signs), out.device)
        add_to_sketch(part, begin, *self._on_device, self._signs_M, out)

    def _pieces(
        self, begin: int, length: int, device: torch.device
    ) -> Iterable[tuple[int, int, int, int, float]]:
        """Runs of elements that are added at consecutive places: the place, where they begin in a part that
        begins at `begin`, where in their block, how many, and their block's sign.
        """
        size = self.size
        width = _CACHED_SUMS if device.type == "cpu" else size
        pieces = []
        for block in range(begin // size, -(-(begin + length) // size)):
            first, end = max(begin, block * size), min(begin + length, (block + 1) * size)
            while first < end:
                source = first - block * size
                place = (source + self._shifts[block]) % size
                run = min(end - first, width - place % width, size - place)
                pieces.append((place, first - begin, source, run, self._block_signs[block]))
                first += run
        # By place, so that sums stay in cache; the blocks of each place stay in order.
        return sorted(pieces, key=lambda piece: piece[0] // width) if width < size else pieces
