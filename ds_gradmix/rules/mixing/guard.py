from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.ops.cosines import agreement, median
from ds_gradmix.rules.base import NormMixing
from ds_gradmix.rules.decision import MixingDecision
from ds_gradmix.rules.mixing.normclip import clip_factors

_LAUNCHES = 70
_STEPS_BEFORE = 5  # in which nobody is left out


class Guard(NormMixing):
    """The mean of the workers, unless one of them trains on something else.

    Ours; two parts, which both leave weights of exactly `1/W` while there is nothing to do:

        clip, at once      c_i = min(1, max_norm_ratio * median |g| / |g_i|)
        agreement          s_i = cos(g_i, sum_{j != i} h_j),  h_j = g_j min(1, median |g| / |g_j|)
        over the steps     e_i <- smoothing e_i + (1 - smoothing) s_i,  bias-corrected
        who is left out    e_i < agreement * median(e), where median(e) > 0
        weights            w_i = c_i keep_i / sum keep

    `c` is taken from the gradients of what is decided on at once (`scope`). `s` is of the whole model's
    gradients and counts from the next step on, so that nothing waits for it. Never more than half of the
    workers are left out, or nobody is; and nobody in the first 5 steps. A worker that recovers comes back by
    itself, since its scores go on. A worker without a finite gradient (`nonfinite: "drop"`) scores 0.

    It assumes that workers draw their data from one distribution: an honest worker with data of a kind of its
    own may be left out. With `agreement` -0.5 only one that points the other way is.
    """

    may_skip: ClassVar[bool] = False
    observes: ClassVar[bool] = True

    max_norm_ratio: float = Field(
        2.0, ge=1, allow_inf_nan=False, description="a longer gradient, in medians of all, is cut to this"
    )
    agreement: float = Field(
        0.5, ge=-1, lt=1, description="share of the median agreement below which a worker is left out"
    )
    smoothing: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of agreement over steps")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(max_norm_ratio=1.2, agreement=0.9, smoothing=0.5), cls(agreement=-0.5)

    def cost(self, num_workers: int) -> RuleCost:
        """Small operations on W numbers; what is observed after the step is in no decision's way."""
        return RuleCost(launches=_LAUNCHES, state_numbers=2 * num_workers)

    def initial_state(self, num_workers: int) -> Tensor:
        """The running sum of agreement of each worker, and how many steps it has."""
        return torch.zeros(2, num_workers, dtype=torch.float64)

    def decide_from_norms(self, norms_SW: Tensor, present_W: Tensor, state_KW: Tensor) -> MixingDecision:
        """Clipped weights of those who are kept."""
        keep_W = self._kept(state_KW) & present_W
        keep_W = torch.where(keep_W.any(), keep_W, present_W)
        factors_SW = clip_factors(norms_SW, self.max_norm_ratio, present_W)
        weights_SW = factors_SW * keep_W / keep_W.sum().clamp(min=1)
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))

    def _kept(self, state_KW: Tensor) -> Tensor:
        sums_W, steps_W = state_KW
        means_W: Tensor = sums_W / (1 - self.smoothing**steps_W).clamp(min=1e-300)
        middle = median(means_W)
        out_W = (means_W < self.agreement * middle) & (middle > 0) & (steps_W >= _STEPS_BEFORE)
        keep_W: Tensor = ~(out_W & (2 * out_W.sum() <= len(out_W)))
        return keep_W

    def observe(self, gram_WW: Tensor, state_KW: Tensor) -> Tensor:
        """The state with this step's agreement."""
        sums_W, steps_W = state_KW
        sums_W = self.smoothing * sums_W + (1 - self.smoothing) * agreement(gram_WW)
        return torch.stack([sums_W, steps_W + 1])
