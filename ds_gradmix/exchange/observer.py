"""Gram matrices of a whole model's gradients, gathered beside their reduction, which does not wait for it.

    1. each bucket is projected to m float32 before it is reduced (ops/sketch.py), and its length is taken
    2. once in a few steps the sketches are exchanged,             a rank sends (R-1)/R 4 m bytes a bucket
       before the optimizer's step, where ranks have just met, and
       Gram matrices of the shares are summed on the first rank    W^2 + W numbers a step

on R ranks. What has at most m elements is sent as it is, and its Gram matrix is exact. Where a rule decides
by Gram matrices, these are taken, and nothing is projected or sent but the W^2 + W numbers. Exact matrices
that no rule decides by cost an exchange of the gradients on top of their reduction.

Memory: 4 m bytes for each bucket, but at most about `held_bytes`, beyond which sketches are exchanged early.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.exchange.bucket import CommDtypes
from ds_gradmix.exchange.plan import even_sizes
from ds_gradmix.ops.gram import gram
from ds_gradmix.ops.multi_tensor import squares
from ds_gradmix.ops.sketch import SketchMaps


class Observation(NamedTuple):
    """What was observed of T steps, each summed over its reductions; in the scale of the gradients."""

    gram_TWW: Tensor
    squares_TW: Tensor  # of the lengths of the ranks' own gradients, summed over each worker's ranks


class Observer:
    """Gathers one group of workers' Gram matrices over some steps.

    Args:
        workers: whose gradients they are.
        group: the ranks with shares or parts of them, over which matrices are summed.
        gram: this rank's share `[1, W, W]` of the Gram matrix of whole gradients (`Exchange.gram`).
        most_steps: T at most.
        device: of the gradients.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        group: RankGroup,
        gram: Callable[[Sequence[Tensor], CommDtypes], Tensor],
        most_steps: int,
        device: torch.device,
    ) -> None:
        self.group = group
        self._workers = workers
        self._gram = gram
        size = (most_steps, workers.size, workers.size)
        self._total_TWW = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares_T = torch.zeros(most_steps, dtype=torch.float64, device=device)
        self._step = 0  # the present one among them
        self._sketches: list[tuple[int, Tensor]] = []  # with the step that they are of

    def add_length(self, parts: Sequence[Tensor], scale: float) -> None:
        """Take the length of what is about to be reduced: flat views, to be multiplied by a scale."""
        if parts:
            self._squares_T[self._step] += squares(parts).sum() * scale**2

    def add_gram(self, gram_SWW: Tensor) -> None:
        """Take over the Gram matrices of a decision, on the rank that decides."""
        self._total_TWW[self._step] += gram_SWW.sum(0)

    def add_exact(self, parts: Sequence[Tensor], scale: float, dtypes: CommDtypes) -> None:
        """Take the Gram matrix of gradients by exchanging them."""
        self._total_TWW[self._step] += self._gram(parts, dtypes)[0] * scale**2

    def add_sketch(self, parts: Sequence[Tensor], scale: float, maps: SketchMaps, held_bytes: int) -> None:
        """Project gradients, to be exchanged later."""
        if not parts:
            return
        sketch = maps.of_length(sum(part.numel() for part in parts))
        sketch_M = parts[0].new_empty(sketch.size, dtype=torch.float32)
        sketch.of(parts, sketch_M)
        self._sketches.append((self._step, sketch_M if scale == 1.0 else sketch_M.mul_(scale)))
        if sum(held_M.nbytes for _, held_M in self._sketches) >= held_bytes:
            self._exchange()

    def _exchange(self) -> None:
        """Take this rank's share of the Gram matrices of what was projected."""
        if not self._sketches:
            return
        workers, sent = self._workers, torch.cat([sketch_M for _, sketch_M in self._sketches])
        sizes = even_sizes(sent.numel(), workers.num_ranks)
        begin = sum(sizes[: workers.rank])
        rows_WC = workers.exchange(sent, sizes, sent.new_empty(workers.receive_size(sizes)))
        lengths, place = [0] * len(self._total_TWW), 0
        for step, sketch_M in self._sketches:  # one step's after the other's
            first, place = place, place + sketch_M.numel()
            lengths[step] += max(min(place, begin + rows_WC.shape[1]) - max(first, begin), 0)
        self._sketches = []
        for total_WW, part_WC in zip(self._total_TWW, rows_WC.split(lengths, dim=1), strict=True):
            if part_WC.shape[1] > 0:
                total_WW += gram(part_WC)

    def end_step(self) -> bool:
        """What comes now is of the next step; returns whether matrices were collected in this one."""
        self._step += 1
        return self._step == 0

    @property
    def is_full(self) -> bool:
        """Whether the present step is the last before they must be collected."""
        return self._step == len(self._total_TWW) - 1

    def collect(self) -> Observation | None:
        """What was observed up to the present step, on the first rank of the group, None on the others."""
        self._exchange()
        num_steps, size = self._step + 1, self._workers.size
        squares_TW = torch.zeros_like(self._total_TWW[:num_steps, 0])
        squares_TW[:, self._workers.number] = self._squares_T[:num_steps]
        total = torch.cat([self._total_TWW[:num_steps].flatten(), squares_TW.flatten()])
        if self.group.num_ranks > 1:
            self.group.reduce(total)
        self._total_TWW.zero_()
        self._squares_T.zero_()
        self._step = -1  # until the present step ends
        if not self.group.is_first:
            return None
        grams, squares = total.split([num_steps * size * size, num_steps * size])
        return Observation(grams.view(num_steps, size, size), squares.view(num_steps, size))
