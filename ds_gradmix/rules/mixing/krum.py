from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.rules.base import GramianMixing, RngKey, WrongParam
from ds_gradmix.rules.decision import MixingDecision

_ROUNDING = 1e-6  # of the squares that distances are differences of: scores no further apart are equal
_LAUNCHES = 58


class Krum(GramianMixing):
    """The one gradient that is closest to its neighbours, where some workers may send anything.

    Blanchard, El Mhamdi, Guerraoui, Stainer 2017, arXiv 1703.02757: with f workers that may be Byzantine, a
    worker's score is the sum of squared distances to its `W - f - 2` nearest others, and the gradient is
    that of the worker with the least score, of the first one if several have it. It needs `W >= f + 3`, and
    the paper proves that it converges for `W > 2f + 2`. All workers but one are thrown away, so the
    gradient is as noisy as one worker's. Distances follow from the Gram matrix: `G_ii + G_jj - 2 G_ij`;
    scores that are equal up to its rounding are equal here. Workers that are left out are not counted in W;
    where fewer than f + 3 are left, one neighbour is taken.
    """

    depends_on_order: ClassVar[bool] = True  # equal scores

    num_byzantine: int = Field(1, ge=0, description="workers f that may send anything; needs f + 3 workers")

    def cost(self, num_workers: int) -> RuleCost:
        """A few small operations, two of which sort."""
        return RuleCost(launches=_LAUNCHES)

    def refused(self, num_workers: int) -> WrongParam | None:
        """More Byzantine workers than `W - 3`."""
        most = num_workers - 3
        if self.num_byzantine <= most:
            return None
        allowed = f"an integer, >= 0, <= {most}" if most >= 0 else "none"
        needed = self.num_byzantine + 3
        return WrongParam(
            "num_byzantine",
            f"{allowed} with {num_workers} workers",
            f"lower it, or use {needed} workers or more",
        )

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]`, 1 for one worker."""
        return self.best(gram_SWW, present_W, torch.ones_like(present_W.sum()))

    def best(self, gram_SWW: Tensor, present_W: Tensor, num_selected: Tensor) -> MixingDecision:
        """Equal weights of so many workers with the least scores."""
        scores_SW, rounding_SW = self._scores(gram_SWW, present_W)
        ordered_SW, places_SW = scores_SW.sort(dim=1)
        last_S1 = (num_selected - 1).clamp(min=0).expand(len(scores_SW), 1)
        bound_S1 = ordered_SW.gather(1, last_S1)
        tolerance_S1 = rounding_SW.gather(1, places_SW.gather(1, last_S1))
        better_SW = scores_SW < bound_S1 - tolerance_S1
        equal_SW = (scores_SW <= bound_S1 + tolerance_S1) & ~better_SW & present_W
        missing_S1 = num_selected - better_SW.sum(1, keepdim=True)
        chosen_SW = better_SW | (equal_SW & (equal_SW.cumsum(1) <= missing_S1))
        weights_SW = chosen_SW.to(gram_SWW.dtype) / chosen_SW.sum(1, keepdim=True).clamp(min=1)
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))

    def _scores(self, gram_SWW: Tensor, present_W: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, infinite for who is not there, and what rounding may make of each."""
        squares_SW = gram_SWW.diagonal(dim1=1, dim2=2)
        sums_SWW = squares_SW[:, :, None] + squares_SW[:, None, :]
        distances_SWW = (sums_SWW - 2.0 * gram_SWW).clamp(min=0)
        others_WW = present_W & ~torch.eye(len(present_W), dtype=torch.bool, device=present_W.device)
        near_SWW, places_SWW = distances_SWW.masked_fill(~others_WW, float("inf")).sort(dim=2)
        num_near = (present_W.sum() - self.num_byzantine - 2).clamp(min=1)
        counted_SWW = (torch.arange(len(present_W), device=present_W.device) < num_near) & near_SWW.isfinite()
        scores_SW = torch.where(counted_SWW, near_SWW, 0.0).sum(2).masked_fill(~present_W, float("inf"))
        rounding_SW = torch.where(counted_SWW, sums_SWW.gather(2, places_SWW), 0.0).sum(2) * _ROUNDING
        return scores_SW, rounding_SW
