"""Which workers had a part in the steps: how often each was kept, and since when one is left out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.rules import MixingDecision


class Change(NamedTuple):
    """A worker was left out of the mean at a step, or is back in it."""

    worker: int
    step: int
    is_left_out: bool


class Participation:
    """Counts on the device, the same on every rank; the host reads them once in a while."""

    def __init__(self, num_workers: int, device: torch.device) -> None:
        # In place throughout: buckets are reduced on another stream than that of the optimizer's step.
        self._kept_W = torch.zeros(num_workers, dtype=torch.float64, device=device)
        self._elements = torch.zeros((), dtype=torch.float64, device=device)
        self._in_step_W = torch.zeros(num_workers, dtype=torch.bool, device=device)  # has had a weight in it
        self._decided = False
        # Rows: whether it is left out, how often it was, since which step, and when it was last back.
        self._left_out_RW = torch.zeros(4, num_workers, dtype=torch.float64, device=device)
        self._times_told = [0.0] * num_workers
        self._is_told = [False] * num_workers

    def add(self, decision: MixingDecision, elements_S: Tensor | float, present_W: Tensor) -> None:
        """Note a decision on S segments of `elements_S` elements each. Nobody is left out where nobody
        agrees, and workers that are not present have no finite gradient, which is told elsewhere.
        """
        kept_SW = decision.weights_SW != 0
        elements_S = torch.ones_like(decision.weights_SW[:, 0]) * elements_S
        self._kept_W += (kept_SW * elements_S[:, None]).sum(0)
        self._elements += elements_S.sum()
        self._in_step_W |= (kept_SW | ~decision.agreed_S[:, None]).any(0) | ~present_W
        self._decided = True

    def end_step(self, step: int) -> None:
        """A step, counted from 1, has had all its decisions."""
        if not self._decided:
            return
        was_W, times_W, since_W, back_W = self._left_out_RW
        now_W = (~self._in_step_W).double()
        began_W, ended_W = now_W * (1 - was_W), was_W * (1 - now_W)
        since_W = torch.where(began_W > 0, step, since_W)
        back_W = torch.where(ended_W > 0, step, back_W)
        self._left_out_RW.copy_(torch.stack([now_W, times_W + began_W, since_W, back_W]))
        self._in_step_W.zero_()
        self._decided = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        told = torch.tensor([self._times_told, self._is_told], dtype=torch.float64)
        return {"left_out": self._left_out_RW, "told": told}

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Take over a checkpoint's, or start afresh."""
        self._left_out_RW.zero_()
        self._times_told = [0.0] * len(self._times_told)
        self._is_told = [False] * len(self._is_told)
        if saved is not None and saved["left_out"].shape == self._left_out_RW.shape:
            self._left_out_RW.copy_(saved["left_out"])
            times, told = saved["told"].tolist()
            self._times_told, self._is_told = times, list(map(bool, told))

    def read(self) -> tuple[list[float], list[Change]]:
        """How often each worker was kept since the last reading, by elements, and who was left out or is back
        since then; the host waits for the device here.
        """
        kept_W = torch.where(self._elements > 0, self._kept_W / self._elements.clamp(min=1), 1.0)
        kept, out, times, since, back = torch.cat([kept_W[None], self._left_out_RW]).tolist()
        self._kept_W.zero_()
        self._elements.zero_()
        changes = []
        for worker in range(len(kept)):
            if times[worker] > self._times_told[worker]:
                changes.append(Change(worker, int(since[worker]), True))
                self._is_told[worker] = True
            if self._is_told[worker] and not out[worker]:
                changes.append(Change(worker, int(back[worker]), False))
                self._is_told[worker] = False
            self._times_told[worker] = times[worker]
        return kept, changes
