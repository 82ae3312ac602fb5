"""Sums and Gram matrices by parameter over the columns of a `[W, C]` tensor, without a loop over parameters.

The columns are divided into blocks of equal length. A block inside one parameter is summed as it is; a block
that several parameters share is copied once for each of them, with the columns of the others set to zero. So
every reduction is a batched product or sum of equal shapes, followed by one `index_add` of a few numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ds_gradmix.ops.gram import gram, multiplies_16_bits

_MAX_BLOCK_SIZE = 4096
_MIN_BLOCK_SIZE = 64
_ROWS_FOR_ONE_PRODUCT = 32  # with so many rows one matrix product keeps a GPU busy, with fewer a batched one


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device without waiting for the device."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def weighted_sum(values_WC: Tensor, weights_WC: Tensor) -> Tensor:
    """`sum_i w_i x_i` over the workers, `[C]`; weights are `[W, 1]` or `[W, C]`, of the same dtype."""
    if weights_WC.shape[1] == 1:
        return torch.mv(values_WC.t(), weights_WC[:, 0])
    return (values_WC * weights_WC).sum(0)


def _squares(values_RC: Tensor) -> Tensor:
    """The sum of squares of each row, in float64 from the start: no overflow, and no small ones lost."""
    norms_R: Tensor = torch.linalg.vector_norm(values_RC, dim=1, dtype=torch.float64)
    return norms_R.square()


class Segments:
    """Which of S segments (parameters) each of C columns belongs to.

    With S = 1 nothing is gathered, and `expand` leaves the columns to broadcasting.

    Args:
        ids: the segment of each run of consecutive columns; a segment may have several runs, or none.
        lengths: the number of columns of each run.
        num_segments: S.
        device: where the values that are reduced are.
        num_rows: the largest number of rows that `gram` will get.
    """

    def __init__(
        self,
        ids: Sequence[int],
        lengths: Sequence[int],
        num_segments: int,
        device: torch.device,
        num_rows: int = 1,
    ) -> None:
        self.num_segments = num_segments
        self._device = device
        self._num_columns = int(sum(lengths))
        wanted = self._num_columns // (8 if num_segments == 1 else max(len(lengths), 1))
        # No smaller than the number of rows, or the Gram matrices of the blocks would outgrow the blocks.
        smallest = max(_MIN_BLOCK_SIZE, 1 << (num_rows - 1).bit_length())
        self._block_size = max(min(1 << max(wanted, 1).bit_length() - 1, _MAX_BLOCK_SIZE), smallest)
        if num_segments > 1:
            self._divide(np.asarray(ids, dtype=np.int64), np.asarray(lengths, dtype=np.int64))

    def _divide(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Set the tables of all pairs of a run and a block that overlap."""
        size = self._block_size
        ids, lengths = ids[lengths > 0], lengths[lengths > 0]
        run_ends = np.cumsum(lengths)
        run_begins = run_ends - lengths
        first_blocks = run_begins // size
        num_blocks = (run_ends - 1) // size - first_blocks + 1
        runs = np.repeat(np.arange(len(ids)), num_blocks)
        blocks = np.arange(len(runs)) + (first_blocks + num_blocks - np.cumsum(num_blocks))[runs]
        begins = np.maximum(run_begins[runs] - blocks * size, 0)
        ends = np.minimum(run_ends[runs] - blocks * size, size)
        full = ends - begins == size
        table = np.stack([ids[runs], blocks, begins, ends, ends - begins])
        parts = table, table.compress(full, axis=1), table.compress(~full, axis=1)
        every, inside, shared = (to_device(torch.from_numpy(part), self._device) for part in parts)
        self._run_segments, *_, self._run_lengths = every  # on a GPU one warp repeats one run in one block
        self._full_segments, self._full_blocks, *_ = inside
        self._shared_segments, self._shared_blocks, self._shared_begins, self._shared_ends, _ = shared

    def gram(self, values_WC: Tensor) -> Tensor:
        """Gram matrices `[S, W, W]` of `[W, C]`, in float64 (gram.py)."""
        one_product = len(values_WC) >= _ROWS_FOR_ONE_PRODUCT or values_WC.device.type == "cpu"
        if self.num_segments == 1 and (one_product or multiplies_16_bits(values_WC)):
            return gram(values_WC)[None]
        blocks_BWC = self._blocks(values_WC, torch.float64)
        return self._sum_blocks(blocks_BWC, lambda x_BWC: torch.bmm(x_BWC, x_BWC.transpose(1, 2)))

    def sum(self, values_C: Tensor) -> Tensor:
        """Sums `[S]` of `[C]`, in float64."""
        if self.num_segments == 1:
            return values_C.sum(dtype=torch.float64).view(1)
        blocks_B1C = self._blocks(values_C[None], values_C.dtype)
        return self._sum_blocks(blocks_B1C, lambda x_B1C: x_B1C[:, 0].sum(1, dtype=torch.float64))

    def sum_of_squares(self, values_C: Tensor) -> Tensor:
        """Sums `[S]` of squares, in float64."""
        if self.num_segments == 1 and values_C.device.type == "cpu":
            return torch.dot(values_C, values_C).double().view(1)  # many accumulators, so next to exact
        if self.num_segments == 1:
            return _squares(values_C[None])
        blocks_B1C = self._blocks(values_C[None], values_C.dtype)
        return self._sum_blocks(blocks_B1C, lambda x_B1C: _squares(x_B1C[:, 0]))

    def expand(self, values_RS: Tensor) -> Tensor:
        """`[R, S]` repeated over the columns: `[R, C]`, or `[R, 1]` where S is 1."""
        if self.num_segments == 1:
            return values_RS
        runs_RS = values_RS.index_select(1, self._run_segments)
        return runs_RS.repeat_interleave(self._run_lengths, dim=1, output_size=self._num_columns)

    def _blocks(self, values_RC: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `[R, C]` in `dtype` as `[B, R, block size]`, padded with zeros."""
        num_padded = -(-self._num_columns // self._block_size) * self._block_size
        padded = torch.empty(values_RC.shape[0], num_padded, dtype=dtype, device=values_RC.device)
        padded[:, : self._num_columns].copy_(values_RC)
        padded[:, self._num_columns :].zero_()
        return padded.view(len(padded), -1, self._block_size).transpose(0, 1)

    def _sum_blocks(self, blocks_BRC: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """A reduction of every block, summed over the blocks of each segment."""
        reduced = reduce(blocks_BRC)
        if self.num_segments == 1:
            return reduced.sum(0, keepdim=True)
        out = reduced.new_zeros(self.num_segments, *reduced.shape[1:])
        out.index_add_(0, self._full_segments, reduced.index_select(0, self._full_blocks))
        columns = torch.arange(self._block_size, device=self._device)
        foreign = (columns < self._shared_begins[:, None]) | (columns >= self._shared_ends[:, None])
        shared = blocks_BRC.index_select(0, self._shared_blocks).masked_fill_(foreign[:, None], 0)
        return out.index_add_(0, self._shared_segments, reduce(shared))
