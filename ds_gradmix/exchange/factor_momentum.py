from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.exchange.plan import Piece
from ds_gradmix.ops import multi_tensor


class FactorMomentum:
    """The running mean p of a scaling rule's factors over optimizer steps, for the elements one rank owns.

        p_t = decay p_{t-1} + (1 - decay) r_t,   used as  p_t / (1 - decay^t)

    (VR-Adam and VR-LAMB, Jiang et al. 2023, arXiv 2309.13681.) A step that reduces several times (ZeRO-2 with
    gradient accumulation) uses `decay p_{t-1} + (1 - decay) r` with the r of each reduction, and p moves on
    by their mean. An element that was not reduced at all has r = `idle`. Until `commit` everything of the
    step is pending, so a skipped step leaves no trace.

    Memory: one float32 an element, and one more from the first reduction of a step to its end.
    """

    def __init__(self, decay: float, idle: float, sizes: Sequence[int], device: torch.device) -> None:
        self.decay = decay
        self.steps = 0
        self._idle = idle
        self._device = device
        self._means: dict[int, Tensor] = {}
        self._begun: dict[int, int] = {}  # step at which each was reserved
        self._pending: dict[int, Tensor] = {}
        self._reductions: dict[tuple[int, int, int], int] = {}  # of each (group, home, length) in this step
        for group, size in enumerate(sizes):
            self.reserve(group, size)

    def reserve(self, group: int, size: int) -> None:
        """Make room for the elements of a group; nothing happens if there is."""
        if group in self._means and self._means[group].numel() == size:
            return
        self._means[group] = torch.zeros(size, dtype=torch.float32, device=self._device)
        self._begun[group] = self.steps
        if self._pending:
            self._pending[group] = torch.full_like(self._means[group], self._idle)

    def begin(self, owned: Sequence[Piece]) -> None:
        """A reduction of these gradients starts: the whole of what this rank owns of each parameter in it."""
        if not self._pending:
            self._pending = {group: torch.full_like(mean, self._idle) for group, mean in self._means.items()}
        keys = [(piece.group, piece.home, piece.length) for piece in owned]
        fresh = [key for key in keys if key not in self._reductions]
        if fresh:
            torch._foreach_zero_(
                [self._pending[group].narrow(0, home, length) for group, home, length in fresh]
            )
        for key in keys:
            self._reductions[key] = self._reductions.get(key, 0) + 1

    def apply(self, pieces: Sequence[Piece], factors_C: Tensor) -> Tensor:
        """Smoothed factors `[C]`, float32, of the pieces, one after the other; notes `factors_C` for the
        commit.
        """
        factors_C = factors_C.float()
        parts = list(factors_C.split([piece.length for piece in pieces]))
        torch._foreach_add_([self._pending[p.group].narrow(0, p.home, p.length) for p in pieces], parts)
        smoothed_C = torch.cat([self._means[p.group].narrow(0, p.home, p.length) for p in pieces])
        multi_tensor.axpby_(1 - self.decay, [factors_C], self.decay, [smoothed_C])
        counts = {self.steps - self._begun[p.group] + 1 for p in pieces}
        if len(counts) == 1:
            return smoothed_C.div_(1 - self.decay ** counts.pop())
        for p, part_C in zip(pieces, smoothed_C.split([p.length for p in pieces]), strict=True):
            part_C.div_(1 - self.decay ** (self.steps - self._begun[p.group] + 1))
        return smoothed_C

    def commit(self) -> None:
        """The step was taken: p moves on."""
        if not self._pending:
            return
        for (group, home, length), count in self._reductions.items():
            if count > 1:
                self._pending[group].narrow(0, home, length).div_(count)
        multi_tensor.axpby_(
            1 - self.decay,
            list(self._pending.values()),
            self.decay,
            [self._means[group] for group in self._pending],
        )
        self.steps += 1
        self.discard()

    def discard(self) -> None:
        """The step was skipped, or is over."""
        self._pending = {}
        self._reductions = {}

    def reset(self) -> None:
        """As new."""
        for group, mean in self._means.items():
            mean.zero_()
            self._begun[group] = 0
        self.steps = 0
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"steps": self.steps, "begun": self._begun, "means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take over a checkpoint's state; False, and nothing changed, if it is of other sizes."""
        means = state["means"]
        if any(
            group not in means or means[group].numel() != mean.numel() for group, mean in self._means.items()
        ):
            return False
        for group, saved in means.items():
            self.reserve(group, saved.numel())
            self._means[group].copy_(saved)
        self._begun.update(state["begun"])
        self.steps = int(state["steps"])
        self.discard()
        return True
