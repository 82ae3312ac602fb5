"""The sketch of a vector (ops/sketch.py) in one launch: each program adds up some of the m places."""

import triton
import triton.language as tl
from torch import Tensor

_PLACES = 512  # of a program


def add_to_sketch(
    part: Tensor, begin: int, shifts_B: Tensor, block_signs_B: Tensor, signs_M: Tensor, out: Tensor
) -> None:
    """Add elements `begin`, `begin + 1`, ... of a vector of `B` blocks to its sketch, `[m]` float32.

    Args:
        part: the elements, flat, in any dtype.
        begin: where they begin in the vector.
        shifts_B: of the blocks, int32.
        block_signs_B: of the blocks, float32.
        signs_M: that all blocks share, float32.
        out: the sketch.
    """
    size = out.numel()
    first, last = begin // size, -(-(begin + part.numel()) // size)
    grid = (triton.cdiv(size, _PLACES),)
    _add_blocks[grid](
        part, shifts_B, block_signs_B, signs_M, out, begin, part.numel(), first, last, size, PLACES=_PLACES
    )


@triton.jit(do_not_specialize=["begin", "length", "first", "last"])
def _add_blocks(
    part, shifts, block_signs, signs, out, begin, length, first, last, size, PLACES: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = places < size
    total = tl.zeros([PLACES], dtype=tl.float32)
    wide_size = tl.zeros([], dtype=tl.int64) + size
    for block in range(first, last):
        sources = places - tl.load(shifts + block)
        sources = tl.where(sources < 0, sources + size, sources)
        index = block * wide_size + sources - begin
        values = tl.load(part + index, mask=inside & (index >= 0) & (index < length), other=0.0)
        own = tl.load(signs + sources, mask=inside, other=0.0)
        total += values.to(tl.float32) * own * tl.load(block_signs + block)
    before = tl.load(out + places, mask=inside, other=0.0)
    tl.store(out + places, before + total, mask=inside)
