"""Momentum of a scaling rule's factors: their running mean over steps, sharded like the optimizer's state."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.exchange.plan import Piece
from ds_gradmix.ops import multi_tensor


class FactorMomentum:
    """The running mean p of a scaling rule's factors, for the elements that one rank owns.

        p_t = decay p_{t-1} + (1 - decay) r_t,   used as  p_t / (1 - decay^t)

    (VR-Adam and VR-LAMB, Jiang et al. 2023, arXiv 2309.13681.) A step that reduces several times (ZeRO-2 with
    gradient accumulation) uses `decay p_{t-1} + (1 - decay) r` with the r of each reduction, and p moves on
    by their mean. An element that was not reduced at all has r = `idle`. Until `commit` everything of the
    step is pending, so a skipped step leaves no trace.

    Memory: one float32 an element, and one more from the first reduction of a step to its end.
    `sizes` are the elements that this rank owns in each of the optimizer's parameter groups.
    """

    def __init__(self, decay: float, idle: float, sizes: Sequence[int], device: torch.device) -> None:
        self.decay = decay
        self.steps = 0
        self._idle = idle
        self._device = device
        self._means: dict[int, Tensor] = {}
        self._begun: dict[int, int] = {}  # step at which each was reserved
        self._pending: dict[int, Tensor] = {}
        self._reductions: dict[tuple[int, int, int], int] = {}  # of each (group, offset, length) in this step
        self._other_groups: dict[Hashable, int] = {}
        for group, size in enumerate(sizes):
            self.reserve(group, size)

    def group_of(self, composition: Hashable, size: int) -> int:
        """The group of a bucket that no rank owns, with room for it; negative, unlike the optimizer's own."""
        group = -1 - self._other_groups.setdefault(composition, len(self._other_groups))
        self.reserve(group, size)
        return group

    def reserve(self, group: int, size: int) -> None:
        """Make room for the elements of a group; nothing happens if there is."""
        if group in self._means and self._means[group].numel() == size:
            return
        self._means[group] = torch.zeros(size, dtype=torch.float32, device=self._device)
        self._begun[group] = self.steps
        if self._pending:
            self._pending[group] = torch.full_like(self._means[group], self._idle)

    def begin(self, owned: Sequence[Piece]) -> None:
        """A reduction of these gradients starts: all that this rank owns of each parameter in it."""
        if not self._pending:
            self._pending = {group: torch.full_like(mean, self._idle) for group, mean in self._means.items()}
        keys = [(piece.group, piece.partition_offset, piece.length) for piece in owned]
        if fresh := [piece for piece, key in zip(owned, keys, strict=True) if key not in self._reductions]:
            torch._foreach_zero_(_views(self._pending, fresh))
        for key in keys:
            self._reductions[key] = self._reductions.get(key, 0) + 1

    def apply(self, pieces: Sequence[Piece], factors_C: Tensor) -> Tensor:
        """Smoothed factors `[C]`, float32, of pieces one after the other; `factors_C` waits for `commit`."""
        factors_C = factors_C.float()
        lengths = [p.length for p in pieces]
        torch._foreach_add_(_views(self._pending, pieces), list(factors_C.split(lengths)))
        smoothed_C = torch.cat(_views(self._means, pieces))
        multi_tensor.axpby_(1 - self.decay, [factors_C], self.decay, [smoothed_C])
        counts = [self.steps - self._begun[p.group] + 1 for p in pieces]
        if len(set(counts)) == 1:
            return smoothed_C.div_(1 - self.decay ** counts[0])
        for count, part_C in zip(counts, smoothed_C.split(lengths), strict=True):
            part_C.div_(1 - self.decay**count)
        return smoothed_C

    def commit(self) -> None:
        """The step was taken: p moves on."""
        if not self._pending:
            return
        for (group, offset, length), count in self._reductions.items():
            if count > 1:
                self._pending[group].narrow(0, offset, length).div_(count)
        means = [self._means[group] for group in self._pending]
        multi_tensor.axpby_(1 - self.decay, list(self._pending.values()), self.decay, means)
        self.steps += 1
        self.discard()

    def discard(self) -> None:
        """The step was skipped, or is over."""
        self._pending = {}
        self._reductions = {}

    def reset(self) -> None:
        """Start afresh."""
        for group, mean in self._means.items():
            mean.zero_()
            self._begun[group] = 0
        self.steps = 0
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        return {"steps": self.steps, "begun": self._begun, "means": self._means}

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a checkpoint's state; False, and nothing changed, if it is of other sizes."""
        means = saved["means"]
        sizes = {group: mean.numel() for group, mean in means.items()}
        if any(sizes.get(group) != mean.numel() for group, mean in self._means.items()):
            return False
        for group, mean in means.items():
            self.reserve(group, mean.numel())
            self._means[group].copy_(mean)
        self._begun.update(saved["begun"])
        self.steps = int(saved["steps"])
        self.discard()
        return True


def _views(buffers: Mapping[int, Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
    return [buffers[p.group].narrow(0, p.partition_offset, p.length) for p in pieces]
