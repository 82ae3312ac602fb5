"""The weighted sum of rows in one launch: each element is read once, in its own dtype."""

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of a program


def weighted_sum(rows_WC: Tensor, weights_W: Tensor) -> Tensor:
    """`sum_i w_i x_i`, `[C]` float32, of rows in any dtype that lie in memory one after another."""
    num_rows, num_columns = rows_WC.shape
    out_C = weights_W.new_empty(num_columns)
    if num_columns > 0:
        grid = (triton.cdiv(num_columns, _COLUMNS),)
        _weighted_sum[grid](rows_WC, weights_W, out_C, num_rows, num_columns, COLUMNS=_COLUMNS)
    return out_C


@triton.jit(do_not_specialize=["num_columns"])
def _weighted_sum(rows, weights, out, num_rows, num_columns, COLUMNS: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for row in range(num_rows):
        values = tl.load(rows + columns, mask=inside, other=0.0)
        total += values.to(tl.float32) * tl.load(weights + row)
        rows += num_columns
    tl.store(out + columns, total, mask=inside)
