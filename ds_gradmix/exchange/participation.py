"""Which workers had a part in the steps: how often each was kept, and since when one is left out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """A worker was left out of the mean at a step, or is back in it."""

    worker: int
    step: int
    is_left_out: bool


class Participation:
    """Counts on the device, the same on every rank; the host reads them once in a while."""

    def __init__(self, num_workers: int, device: torch.device) -> None:
        zeros_W = torch.zeros(num_workers, dtype=torch.float64, device=device)
        self._kept_W, self._elements = zeros_W, torch.zeros_like(zeros_W[0])
        self._in_step_W = zeros_W.bool()  # whether a worker has had a weight in this step
        self._decided = False
        # Rows: whether it is left out, how often it was, since which step, and when it was last back.
        self._left_out_RW = torch.zeros(4, num_workers, dtype=torch.float64, device=device)
        self._times_told = [0] * num_workers
        self._is_told = [False] * num_workers

    def add(self, weights_SW: Tensor, elements_S: Tensor | float, present_W: Tensor) -> None:
        """Note the weights of decisions on S segments of `elements_S` elements each; workers that are not
        present have no finite gradient, which is told elsewhere.
        """
        kept_SW = weights_SW != 0
        elements_S = torch.ones_like(weights_SW[:, 0]) * elements_S
        self._kept_W = self._kept_W + (kept_SW * elements_S[:, None]).sum(0)
        self._elements = self._elements + elements_S.sum()
        self._in_step_W = self._in_step_W | kept_SW.any(0) | ~present_W
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
        self._left_out_RW = torch.stack([now_W, times_W + began_W, since_W, back_W])
        self._in_step_W = torch.zeros_like(self._in_step_W)
        self._decided = False

    def state(self) -> Tensor:
        """What a checkpoint holds."""
        return self._left_out_RW

    def load(self, saved_RW: Tensor) -> None:
        """Take over a checkpoint's; what happened until then has been told."""
        if saved_RW.shape == self._left_out_RW.shape:
            self._left_out_RW = saved_RW.to(self._left_out_RW)
            out, times, *_ = saved_RW.tolist()
            self._is_told, self._times_told = list(map(bool, out)), list(map(int, times))

    def read(self) -> tuple[list[float], list[Change]]:
        """How often each worker was kept since the last reading, by elements, and who was left out or is back
        since then; the host waits for the device here.
        """
        kept_W = torch.where(self._elements > 0, self._kept_W / self._elements.clamp(min=1), 1.0)
        kept, out, times, since, back = torch.cat([kept_W[None], self._left_out_RW]).tolist()
        self._kept_W = torch.zeros_like(self._kept_W)
        self._elements = torch.zeros_like(self._elements)
        changes = []
        for worker in range(len(kept)):
            if times[worker] > self._times_told[worker]:
                changes.append(Change(worker, int(since[worker]), True))
                self._is_told[worker] = True
            if self._is_told[worker] and not out[worker]:
                changes.append(Change(worker, int(back[worker]), False))
                self._is_told[worker] = False
            self._times_told[worker] = int(times[worker])
        return kept, changes
