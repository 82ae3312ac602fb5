"""The few numbers of each worker that a mixing rule keeps over optimizer steps, the same on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup


class MixingState:
    """The state `[K, W]` of a mixing rule for one group of workers; it moves on once a step.

    Each decision of a step, on a bucket, a parameter or the model, is given the same state and comes with a
    next one. After a step that was taken the state is the mean of these, weighted by the elements decided on;
    after a skipped one it is as before. Nothing here makes the host wait for the device.
    """

    def __init__(self, initial_KW: Tensor, device: torch.device) -> None:
        self._initial_KW = initial_KW.to(device=device, dtype=torch.float64)
        self.values_KW = self._initial_KW
        # Of this step: the sum of next states times elements, and the elements.
        self._sums = torch.zeros(self.values_KW.numel() + 1, dtype=torch.float64, device=device)
        self._observed_KW: Tensor | None = None  # the next state of a rule that observes

    def add(self, next_SKW: Tensor, elements_S: Tensor | float) -> None:
        """Note the next state after decisions on S segments of `elements_S` elements each."""
        if len(self.values_KW) == 0:
            return
        elements_S = torch.ones_like(next_SKW[:, 0, 0]) * elements_S
        self._sums[:-1] += (next_SKW.flatten(1) * elements_S[:, None]).sum(0)
        self._sums[-1] += elements_S.sum()

    def observe(self, next_KW: Tensor) -> None:
        """Note the next state that a rule has after it saw the step, the same on every rank."""
        self._observed_KW = next_KW

    def sum_over(self, group: RankGroup) -> None:
        """At the end of a step whose decisions are not all known to all ranks of the group."""
        if len(self.values_KW) > 0:
            group.all_reduce_identical(self._sums)

    def end_step(self, *, taken: bool) -> None:
        """Move on if the step was taken."""
        if taken and self._observed_KW is not None:
            self.values_KW = self._observed_KW
        elif taken:
            next_KW = (self._sums[:-1] / self._sums[-1].clamp(min=1)).view_as(self.values_KW)
            self.values_KW = torch.where(self._sums[-1] > 0, next_KW, self.values_KW)
        self._sums.zero_()
        self._observed_KW = None

    def load(self, saved_KW: Tensor | None) -> bool:
        """Take over a checkpoint's state, or start afresh; False if it is of other workers."""
        fits = saved_KW is not None and saved_KW.shape == self._initial_KW.shape
        self.values_KW = self._initial_KW
        if saved_KW is not None and fits:
            self.values_KW = saved_KW.to(self._initial_KW)
        self._sums.zero_()
        self._observed_KW = None
        return fits


def load_states(states: Sequence[MixingState], saved: Sequence[Tensor]) -> bool:
    """Take over the states of several groups of workers; False, and all afresh, if they are others."""
    fit = len(states) == len(saved) and all(
        state.load(values_KW) for state, values_KW in zip(states, saved, strict=True)
    )
    if not fit:
        for state in states:
            state.load(None)
    return fit
