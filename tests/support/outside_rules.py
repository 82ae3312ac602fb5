"""Rules such as a user has in a package of his own: one for each slot, and one that keeps state."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix import rules
from ds_gradmix.rules import GramianMixing, MixingDecision, RngKey

MODULE = __name__


class Trust(GramianMixing):
    """Weights `exp(t_i)`, normalised, of a running mean `t_i` of each worker's cosine to the mean.

    A step in which the first worker's cosine is below `skip_below` has no weights, and is skipped.
    """

    decay: float = 0.5
    skip_below: float = -2.0

    def initial_state(self, num_workers: int) -> Tensor:
        return torch.zeros(1, num_workers, dtype=torch.float64)

    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        to_mean_SW = gram_SWW.sum(2)
        lengths_SW = gram_SWW.diagonal(dim1=1, dim2=2).sqrt() * to_mean_SW.sum(1, keepdim=True).sqrt()
        cosines_SW = torch.where(lengths_SW > 0, to_mean_SW / lengths_SW, 0.0).nan_to_num()
        next_SKW = (self.decay * state_KW[0] + (1 - self.decay) * cosines_SW)[:, None]
        raw_SW = next_SKW[:, 0].exp() * present_W
        agreed_S = (cosines_SW[:, 0] >= self.skip_below) & present_W.any()
        weights_SW = raw_SW / raw_SW.sum(1, keepdim=True).clamp(min=1e-300) * agreed_S[:, None]
        return MixingDecision(weights_SW, agreed_S), next_SKW


class Turns(rules.GradientFreeMixing):
    """One worker after the other has all the weight."""

    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        return np.eye(num_workers)[[key.step % num_workers]]


class Spread(rules.Scaling):
    """`r = |m| / (|m| + s / S)`, s the standard deviation over the workers, S its mean over the layer."""

    num_statistics: ClassVar[int] = 2

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        square_C = rules.weighted_sum((grads_WC.to(mean_C.dtype) - mean_C).square_(), weights_WC)
        return torch.stack([square_C.sqrt(), torch.full_like(mean_C, len(grads_WC))])

    def layer_terms(self, mean_C: Tensor, statistics_KC: Tensor) -> Tensor:
        return torch.stack([statistics_KC[0], mean_C.abs(), torch.ones_like(mean_C)])

    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        noise_LC, size_LC = layer_sums_LC[:1], layer_sums_LC[1:2]
        relative_C = torch.where(size_LC > 0, noise_LC / size_LC, 0.0)[0].to(mean_C.dtype)
        return (1 / (1 + relative_C)).expand_as(mean_C)


class Backwards(rules.Extrapolation):
    """`δ = -half the learning rate · the worker's gradient of the step before`."""

    needs_gradient: ClassVar[bool] = True

    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return -past_C

    def scale(self, learning_rate: float) -> float:
        return learning_rate / 2


class Unfinished(GramianMixing):
    """A rule that decides nothing."""


class NoRule:
    """No rule at all, although it has a rule's methods."""

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> None:
        raise AssertionError("never called")


def a_function() -> None:
    """Not a class."""
    raise AssertionError("never called")
