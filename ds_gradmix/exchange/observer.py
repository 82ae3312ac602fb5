"""The Gram matrix of a whole model's gradients, gathered beside their reduction: no update waits for it.

    1. each bucket is projected to m float32 before it is reduced (ops/sketch.py), and its length is taken
    2. after the optimizer's step the sketches are exchanged;      a rank sends (R-1)/R 4 m bytes a bucket
       Gram matrices of the shares are summed on the first rank    W^2 + W numbers

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
from ds_gradmix.ops.multi_tensor import norms
from ds_gradmix.ops.sketch import SketchMaps

_FLOAT32 = CommDtypes(torch.float32, torch.float32)


class Observation(NamedTuple):
    """What was observed of a step, summed over its reductions; float64, in the scale of the gradients."""

    gram_WW: Tensor
    squares_W: Tensor  # of the lengths of the ranks' own gradients, summed over each worker's ranks


class Observer:
    """Gathers one group of workers' Gram matrices over a step.

    Args:
        workers: whose gradients they are.
        group: the ranks with shares or parts of them, over which matrices are summed.
        gram: this rank's share `[1, W, W]` of the Gram matrix of whole gradients (`Exchange.gram`).
        device: of the gradients.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        group: RankGroup,
        gram: Callable[[Sequence[Tensor], CommDtypes], Tensor],
        device: torch.device,
    ) -> None:
        self.group = group
        self._workers = workers
        self._gram = gram
        self._total_WW = torch.zeros(workers.size, workers.size, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._sketches: list[Tensor] = []

    def add_length(self, parts: Sequence[Tensor], scale: float) -> None:
        """Take the length of what is about to be reduced: flat views, to be multiplied by a scale."""
        if parts:
            self._squares += norms(parts).double().square().sum() * scale**2

    def add_gram(self, gram_SWW: Tensor) -> None:
        """Take over the Gram matrices of a decision, on the rank that decides."""
        self._total_WW += gram_SWW.sum(0)

    def add_exact(self, parts: Sequence[Tensor], scale: float, dtypes: CommDtypes) -> None:
        """Take the Gram matrix of gradients by exchanging them."""
        self._total_WW += self._gram(parts, dtypes)[0] * scale**2

    def add_sketch(self, parts: Sequence[Tensor], scale: float, maps: SketchMaps, held_bytes: int) -> None:
        """Project gradients, to be exchanged later."""
        if not parts:
            return
        sketch = maps.of_length(sum(part.numel() for part in parts))
        sketch_M = parts[0].new_empty(sketch.size, dtype=torch.float32)
        sketch.of(parts, sketch_M)
        self._sketches.append(sketch_M if scale == 1.0 else sketch_M.mul_(scale))
        if sum(held.nbytes for held in self._sketches) >= held_bytes:
            self.exchange_sketches()

    def exchange_sketches(self) -> None:
        """Take this rank's share of the Gram matrices of what was projected."""
        if self._sketches:
            self._total_WW += self._gram(self._sketches, _FLOAT32)[0]
            self._sketches = []

    def collect(self) -> Observation | None:
        """The step's observation on the first rank of the group, None on the others; the next step begins."""
        self.exchange_sketches()
        squares_W = torch.zeros_like(self._total_WW[0])
        squares_W[self._workers.number] = self._squares
        total = torch.cat([self._total_WW.flatten(), squares_W])
        if self.group.num_ranks > 1:
            self.group.reduce(total)
        self._total_WW.zero_()
        self._squares.zero_()
        if not self.group.is_first:
            return None
        size = self._workers.size
        return Observation(total[: size * size].view(size, size), total[size * size :])
