"""Sums and inner products by parameter over the columns of a `[W, C]` tensor, without a loop over parameters.

The columns are cut into blocks of equal length. A block inside one parameter is summed as it stands; one that
several parameters share is copied once for each of them, with the others' columns set to zero. So every
reduction is a batched product or sum of equal shapes followed by one `index_add` of a few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LONGEST_BLOCK = 4096
_SHORTEST_BLOCK = 64
_MANY_ROWS = 32  # from here on one matrix product keeps a GPU busy; with fewer, blocks of columns do


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device without waiting for the device."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def weighted_sum(values_WC: Tensor, weights_WC: Tensor) -> Tensor:
    """`sum_i w_i x_i` over the workers, `[C]`; weights are `[W, 1]` or `[W, C]`, both of one dtype."""
    if weights_WC.shape[1] == 1:
        return torch.mv(values_WC.t(), weights_WC[:, 0])
    return (values_WC * weights_WC).sum(0)


class Segments:
    """Which of S segments (parameters) each of C columns belongs to.

    `ids` and `lengths` describe consecutive runs of columns; one segment may have several runs. With S = 1
    nothing is gathered and `expand` broadcasts. `num_rows` is the largest number of rows that `gram` will
    see.
    """

    _run_ids: Tensor
    _run_lengths: Tensor
    _whole_blocks: Tensor
    _whole_ids: Tensor
    _part_blocks: Tensor
    _part_ids: Tensor
    _part_low: Tensor
    _part_high: Tensor

    def __init__(
        self,
        ids: Sequence[int],
        lengths: Sequence[int],
        num_segments: int,
        device: torch.device,
        num_rows: int = 1,
    ) -> None:
        self.num_segments = num_segments
        self.num_columns = int(sum(lengths))
        wanted = self.num_columns // (8 if num_segments == 1 else max(len(lengths), 1))
        # No shorter than there are rows, or the Gram matrices of the blocks would outgrow the blocks.
        shortest = max(_SHORTEST_BLOCK, 1 << (num_rows - 1).bit_length())
        self.block = max(min(1 << max(wanted, 1).bit_length() - 1, _LONGEST_BLOCK), shortest)
        self.num_padded = -(-self.num_columns // self.block) * self.block
        self._device = device
        if num_segments > 1:
            self._cut(np.asarray(ids, dtype=np.int64), np.asarray(lengths, dtype=np.int64))

    def _cut(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        ids, lengths = ids[lengths > 0], lengths[lengths > 0]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        first, last = starts // self.block, (ends - 1) // self.block
        runs = np.repeat(np.arange(len(ids)), last - first + 1)  # the run of every (run, block) pair
        offsets = np.arange(len(runs)) - np.repeat(
            np.cumsum(last - first + 1) - (last - first + 1), last - first + 1
        )
        blocks = first[runs] + offsets
        low = np.maximum(starts[runs] - blocks * self.block, 0)
        high = np.minimum(ends[runs] - blocks * self.block, self.block)
        whole = high - low == self.block
        tables = {
            "_run_ids": ids[runs],  # runs cut at blocks: on a GPU one warp repeats one run
            "_run_lengths": high - low,
            "_whole_blocks": blocks[whole],
            "_whole_ids": ids[runs[whole]],
            "_part_blocks": blocks[~whole],
            "_part_ids": ids[runs[~whole]],
            "_part_low": low[~whole],
            "_part_high": high[~whole],
        }
        for name, table in tables.items():
            setattr(self, name, to_device(torch.from_numpy(np.ascontiguousarray(table)), self._device))

    def pad(self, values_RC: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `[R, C]` in `dtype`, padded with zero columns to whole blocks."""
        padded = torch.empty(values_RC.shape[0], self.num_padded, dtype=dtype, device=values_RC.device)
        padded[:, : self.num_columns].copy_(values_RC)
        padded[:, self.num_columns :].zero_()
        return padded

    def gram(self, values_WC: Tensor) -> Tensor:
        """Gram matrices `[S, W, W]` of `[W, C]`, in float64: no overflow, and no tensor-core rounding."""
        num_rows = values_WC.shape[0]
        if self.num_segments == 1 and num_rows >= _MANY_ROWS:
            exact_WC = values_WC.double()
            return torch.mm(exact_WC, exact_WC.t())[None]
        blocks_BWC = self.pad(values_WC, torch.float64).view(num_rows, -1, self.block).transpose(0, 1)
        if self.num_segments == 1:
            return torch.bmm(blocks_BWC, blocks_BWC.transpose(1, 2)).sum(0, keepdim=True)
        out_SWW = blocks_BWC.new_zeros(self.num_segments, num_rows, num_rows)
        whole = torch.bmm(blocks_BWC, blocks_BWC.transpose(1, 2))
        out_SWW.index_add_(0, self._whole_ids, whole.index_select(0, self._whole_blocks))
        part = blocks_BWC.index_select(0, self._part_blocks).masked_fill_(self._outside()[:, None], 0)
        return out_SWW.index_add_(0, self._part_ids, torch.bmm(part, part.transpose(1, 2)))

    def sum(self, values_C: Tensor) -> Tensor:
        """Sums `[S]` of `[C]`, in float64."""
        if self.num_segments == 1:
            return values_C.sum(dtype=torch.float64).view(1)
        blocks_BC = self.pad(values_C[None], values_C.dtype).view(-1, self.block)
        out_S = torch.zeros(self.num_segments, dtype=torch.float64, device=values_C.device)
        whole = blocks_BC.sum(1, dtype=torch.float64)
        out_S.index_add_(0, self._whole_ids, whole.index_select(0, self._whole_blocks))
        part = blocks_BC.index_select(0, self._part_blocks).masked_fill_(self._outside(), 0)
        return out_S.index_add_(0, self._part_ids, part.sum(1, dtype=torch.float64))

    def expand(self, values_RS: Tensor) -> Tensor:
        """`[R, S]` spread over the columns: `[R, C]`, or `[R, 1]` where S is 1."""
        if self.num_segments == 1:
            return values_RS
        runs_RS = values_RS.index_select(1, self._run_ids)
        return runs_RS.repeat_interleave(self._run_lengths, dim=1, output_size=self.num_columns)

    def _outside(self) -> Tensor:
        place = torch.arange(self.block, device=self._device)
        return (place < self._part_low[:, None]) | (place >= self._part_high[:, None])
