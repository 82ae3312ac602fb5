from typing import ClassVar

import torch
from torch import Tensor

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.ops.cosines import median
from ds_gradmix.rules.base import NormMixing
from ds_gradmix.rules.decision import MixingDecision

_LAUNCHES = 50


class NormClip(NormMixing):
    """Each gradient is cut to at most the median length, and then the mean is taken.

    `w_i = min(1, median |g| / |g_i|) / W`: so the weights sum to less than 1 unless all are equally long.
    Ours; the norm bound that robust aggregation is often compared with (Sun et al. 2019, arXiv 1911.07963),
    with the median for the bound.
    """

    may_skip: ClassVar[bool] = False

    def cost(self, num_workers: int) -> RuleCost:
        """Small operations on W numbers."""
        return RuleCost(launches=_LAUNCHES)

    def decide_from_norms(self, norms_SW: Tensor, present_W: Tensor, state_KW: Tensor) -> MixingDecision:
        """Weights of the workers present."""
        factors_SW = clip_factors(norms_SW, 1.0, present_W)
        weights_SW = factors_SW * present_W / present_W.sum().clamp(min=1)
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))


def clip_factors(norms_SW: Tensor, ratio: float, present_W: Tensor) -> Tensor:
    """`min(1, ratio * median |g| / |g_i|)`, `[S, W]`; 1 where the median is 0, as of an expert or embedding
    that few workers used.
    """
    limit_S1 = ratio * median(norms_SW, present_W)[:, None]
    return torch.where((norms_SW > limit_S1) & (limit_S1 > 0), limit_S1 / norms_SW, 1.0)
