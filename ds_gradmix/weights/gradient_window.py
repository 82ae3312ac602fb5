"""A worker's own gradient, collected over the micro-steps of one optimizer step."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.ops import multi_tensor


class ParamLayout(NamedTuple):
    """Where the optimizer's parameters lie in memory."""

    flats: Sequence[Tensor]  # the parameters of each of the optimizer's groups, flat, in their own dtype
    places: Sequence[tuple[int, int, int]]  # of a parameter: its group, where it begins there, its elements

    def new_buffer(self) -> list[Tensor]:
        """Zeros of the parameters' size and dtype."""
        return [torch.zeros_like(flat) for flat in self.flats]

    def views(self, flats: Sequence[Tensor], indices: Iterable[int]) -> list[Tensor]:
        """The parts of flat tensors that belong to these parameters."""
        return [flats[g].narrow(0, begin, size) for g, begin, size in (self.places[i] for i in indices)]


class GradientWindow:
    """The gradient of one optimizer step, before it is averaged with other workers' gradients.

    The only reduction of a step puts its gradients into the caller's buffer. Several, whether known from the
    start (`accumulates`) or not, are added up in a second buffer, and `finish` swaps the two.
    """

    def __init__(self, layout: ParamLayout, *, accumulates: bool) -> None:
        self._layout = layout
        self._sums = layout.new_buffer() if accumulates else None
        self._collecting = False  # the sums have gradients of this step
        self._incomplete = False  # gradients of this step were discarded

    def add(
        self, indices: Sequence[int], parts: Sequence[Tensor], buffer: Sequence[Tensor], *, last: bool
    ) -> None:
        """Add flat gradients of these parameters; `last` in the step's last reduction."""
        if self._sums is None and last:
            torch._foreach_copy_(self._layout.views(buffer, indices), list(parts))
            return
        self._sums = self._layout.new_buffer() if self._sums is None else self._sums
        multi_tensor.axpby_(1.0, parts, 1.0, self._layout.views(self._sums, indices))
        self._collecting = True

    def finish(self, buffer: list[Tensor], missing: Sequence[int]) -> tuple[list[Tensor], bool]:
        """The buffer with the gradient, in place of the caller's, and whether the gradient is complete.

        `missing` are the parameters that were not in the last reduction.
        """
        complete = not self._incomplete
        if self._sums is not None:
            buffer, self._sums = self._sums, buffer
        elif missing:
            torch._foreach_zero_(self._layout.views(buffer, missing))
        self.clear(in_step=False)
        return buffer, complete

    def clear(self, *, in_step: bool) -> None:
        """Discard what was collected; `in_step` if more gradients of the same step may come."""
        self._incomplete = in_step and (self._incomplete or self._collecting)
        self._collecting = False
        for flat in self._sums or ():
            flat.zero_()
