import torch
from pydantic import Field
from torch import Tensor

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.rules.base import GramianMixing, RngKey
from ds_gradmix.rules.decision import MixingDecision

_NO_DIRECTION = 1e-8  # of the mean length: a gradient that is no longer has none
_NO_CONSENSUS = 1e-6  # in place of 1: coefficients whose sum is no larger are what rounding leaves of 0
_LAUNCHES = 48


class AdaCons(GramianMixing):
    """Adaptive consensus: a worker's direction counts by how far the mean gradient goes along it.

    Choukroun, Azoulay, Kisilev 2024, arXiv 2411.03742, and its public code, g being the mean gradient:

        a_i = <g, g_i> / |g_i|;   m <- momentum m + (1 - momentum) sort(a), m = sort(a) at the first step
        a_i <- the number in m with the rank that a_i has;   a <- a / sum a;   sum_i a_i g_i / |g_i|

    Two things are ours. As published, the combined gradient has no more than length 1, whatever the length
    of the gradients: DeepSpeed, which divides it by fp16's loss scale, would make it shorter and shorter as
    that grows. So it has the published direction, and is multiplied by the mean of the `|g_i|`; identical
    workers then give their gradient. For the same reason m is kept in units of that mean. Where the
    coefficients sum to 0, as with workers that cancel, they are equal. Weights do not sum to 1, and may be
    negative. A zero gradient has no direction, and weight 0; so it has its share of the coefficients for
    nothing. A step that leaves a worker out goes without m, which has a number for every worker, and leaves
    it. Buckets of a step have the same m, and move it by their mean; published is scope "model".
    """

    momentum: float = Field(
        0.99, ge=0, lt=1, allow_inf_nan=False, description="of the sorted coefficients over steps; 0 is off"
    )

    def cost(self, num_workers: int) -> RuleCost:
        """A few small operations, and the state."""
        return RuleCost(launches=_LAUNCHES, state_numbers=2 * num_workers)

    def initial_state(self, num_workers: int) -> Tensor:
        """Sorted coefficients, and how much of a step they are from: 0, and 1 after the first."""
        return torch.zeros(2, num_workers, dtype=torch.float64)

    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        """Weights `[S, W]`, and `[S, 2, W]`."""
        there_W = present_W.to(gram_SWW.dtype)
        gram_SWW = torch.where(present_W & present_W[:, None], gram_SWW, 0.0)
        num = there_W.sum().clamp(min=1)
        lengths_SW = gram_SWW.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        mean_S1 = lengths_SW.sum(1, keepdim=True) / num
        inverse_SW = torch.where(lengths_SW > _NO_DIRECTION * mean_S1, mean_S1 / lengths_SW, 0.0)
        unit_S1 = torch.where(mean_S1 > 0, mean_S1.square(), 1.0)
        raw_SW = gram_SWW.sum(2) / num * inverse_SW / unit_S1
        smoothed_SW, next_SKW = self._smooth(raw_SW, state_KW)
        moves_S1 = present_W.all() & (mean_S1 > 0)
        share_SW = torch.where(moves_S1, smoothed_SW, raw_SW) * there_W
        sum_S1 = share_SW.sum(1, keepdim=True)
        share_SW = torch.where(sum_S1.abs() > _NO_CONSENSUS, share_SW / sum_S1, there_W / num)
        weights_SW = torch.where(mean_S1 > 0, share_SW * inverse_SW, there_W / num)
        next_SKW = torch.where(moves_S1[:, :, None], next_SKW, state_KW)
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW))), next_SKW

    def _smooth(self, raw_SW: Tensor, state_KW: Tensor) -> tuple[Tensor, Tensor]:
        """Each worker's coefficient after smoothing, and the next state."""
        sorted_SW, places_SW = raw_SW.sort(dim=1, stable=True)
        before_W = torch.where(state_KW[1] > 0, state_KW[0] / state_KW[1], sorted_SW)
        next_SW = self.momentum * before_W + (1.0 - self.momentum) * sorted_SW
        smoothed_SW = torch.empty_like(next_SW).scatter_(1, places_SW, next_SW)
        return smoothed_SW, torch.stack([next_SW, torch.ones_like(next_SW)], dim=1)
