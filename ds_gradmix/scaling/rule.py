"""What a scaling rule is: it turns W workers' gradients into one factor for every coordinate."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Signal(NamedTuple):
    """What one pass over the workers' gradients tells about C coordinates."""

    mean_C: Tensor  # weighted mean over the workers
    ratio_C: Tensor  # signal-to-noise ratio, not yet normalised; inf without noise, -1 without any gradient

    def layer_terms(self) -> tuple[Tensor, Tensor]:
        """What each coordinate adds to its layer's sum of ratios, and to its count: `[C]` both."""
        idle_C = self.ratio_C < 0
        ratio_C = torch.where(self.ratio_C == float("inf"), 1.0, self.ratio_C)
        return torch.where(idle_C, 0.0, ratio_C), (~idle_C).to(ratio_C.dtype)


class Scaling(BaseModel):
    """Base of all scaling rules; its fields are the rule's `params` in ds_config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min_workers: ClassVar[int] = 1  # with fewer, rank 0 warns

    @property
    def smoothing(self) -> float:
        """Decay of the factors' running mean over optimizer steps, 0 for none (then there is no state)."""
        return 0.0

    @property
    @abstractmethod
    def idle_factor(self) -> float:
        """Factor of a coordinate that has no gradient at all."""

    @abstractmethod
    def signal(self, grads_WC: Tensor, weights_WC: Tensor) -> Signal:
        """Statistics of C coordinates from gradients `[W, C]`, of any dtype, which are not changed.

        `weights_WC` is `[W, C]` or `[W, 1]`, in float32 or float64, which is what is computed in.
        """

    @abstractmethod
    def factors(self, signal: Signal, layer_mean_C: Tensor) -> Tensor:
        """Factors `[C]` from the statistics and the mean ratio of each one's layer (`[C]` or `[1]`)."""
