"""What a scaling rule is: it turns W workers' gradients into one factor for every coordinate."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Signal(NamedTuple):
    """What one pass over the workers' gradients tells about C coordinates."""

    mean_C: Tensor  # weighted mean over the workers
    ratio_C: Tensor  # signal-to-noise ratio, not yet normalised
    noiseless_C: Tensor  # bool, whether there is a mean without noise: its factor is 1
    counted_C: Tensor  # bool, whether the coordinate takes part in its layer's mean ratio


class Scaling(BaseModel):
    """Base of all scaling rules; its fields are the rule's `params` in ds_config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

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
        """Statistics of C coordinates from gradients `[W, C]`, float32 or float64, which are overwritten.

        `weights_WC` is of the same dtype, `[W, C]` or `[W, 1]`.
        """

    @abstractmethod
    def factors(self, signal: Signal, layer_mean_C: Tensor) -> Tensor:
        """Factors `[C]` from the statistics and the mean ratio of each one's layer (`[C]` or `[1]`)."""
