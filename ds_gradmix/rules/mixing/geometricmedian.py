import torch
from torch import Tensor

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.rules.base import GramianMixing, RngKey
from ds_gradmix.rules.decision import MixingDecision

_STEPS = 32  # bring the sum of distances to 1e-4 of its least; most gradients need 5
_LEAST_BY_LENGTH = 1e-3  # of a gradient's length: Gram matrices have no digits for shorter distances
_LEAST_BY_DISTANCE = 1e-6  # of the mean distance
_LAUNCHES = (30, 9)  # once, and for each step


class GeometricMedian(GramianMixing):
    """The point with the least sum of distances to the gradients: a few that are far off hardly move it.

    Pillutla, Kakade, Harchaoui 2019, arXiv 1912.13445 (RFA), by Weiszfeld's algorithm from the mean:

        d_i = max(nu_i, |g_i - z|);   w_i = (1/d_i) / sum_j (1/d_j);   z = sum_i w_i g_i

    on the distances between gradients, which follow from the Gram matrix: with weights that sum to 1,
    `|g_i - z|^2 = (D w)_i - (w D w)/2` for `D_ij = |g_i - g_j|^2`. Ours: 32 steps always, so that the host
    waits for no residual, and nu_i is 0.001 `|g_i|`, since a Gram matrix does not tell shorter distances from
    its rounding. The sum of distances is then within 1e-4 of its least. Up to half of the workers may send
    anything. Two workers have their mean.
    """

    def cost(self, num_workers: int) -> RuleCost:
        """Small products and sums, step by step."""
        fixed, of_step = _LAUNCHES
        return RuleCost(launches=fixed + of_step * _STEPS)

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]`, which sum to 1."""
        there_W = present_W.to(gram_SWW.dtype)
        gram_SWW = torch.where(present_W & present_W[:, None], gram_SWW, 0.0)
        squares_SW = gram_SWW.diagonal(dim1=1, dim2=2)
        distances_SWW = (squares_SW[:, :, None] + squares_SW[:, None, :] - 2.0 * gram_SWW).clamp(min=0)
        weights_SW = (there_W / there_W.sum().clamp(min=1)).expand_as(squares_SW)
        mean_S1 = (_squared_distances(distances_SWW, weights_SW).clamp(min=0).sqrt() * weights_SW).sum(
            1, keepdim=True
        )
        least_SW = torch.maximum(
            _LEAST_BY_LENGTH * squares_SW.clamp(min=0).sqrt(), _LEAST_BY_DISTANCE * mean_S1
        )
        least_SW = torch.where(mean_S1 > 0, least_SW.square(), 1.0)
        for _ in range(_STEPS):
            squared_SW = torch.maximum(_squared_distances(distances_SWW, weights_SW), least_SW)
            inverse_SW = squared_SW.rsqrt() * there_W
            weights_SW = inverse_SW / inverse_SW.sum(1, keepdim=True)
        weights_SW = torch.where(present_W, weights_SW, 0.0)  # also where nobody is there
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))


def _squared_distances(distances_SWW: Tensor, weights_SW: Tensor) -> Tensor:
    """Of the gradients to their weighted mean, `[S, W]`; with rounding they may be below 0."""
    to_each_SW = torch.bmm(distances_SWW, weights_SW[:, :, None])[:, :, 0]
    return torch.sub(to_each_SW, (to_each_SW * weights_SW).sum(1, keepdim=True), alpha=0.5)
