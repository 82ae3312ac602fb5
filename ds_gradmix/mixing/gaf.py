from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ds_gradmix.mixing.rule import Decision, GramMixing, Moment, generator

_ROUNDING = 1e-6  # two equal float32 gradients may come out this far from cosine 1
_ORDER_STREAM = 1  # independent of what a KnownMixing would draw at the same moment


class GAF(GramMixing):
    """Gradient Agreement Filtering: a worker that points elsewhere is left out of the mean.

    Chaubard, Eyzaguirre, Kochenderfer 2024, arXiv 2412.18052:

        a <- g_1, c <- 1;  for i = 2..W:  if 1 - cos(a, g_i) <= threshold:  a <- a + g_i, c <- c + 1

    and the gradient is `a/c`, or the step is skipped if nobody agreed (c = 1). All of it follows from the
    Gram matrix: `<a, g_i>` and `<a, a>` are updated from its rows, and no gradient is read twice. `merge:
    "midpoint"` is what the public reference code does, `a <- (a + g_i)/2`. Ours are `order: "shuffled"` (the
    anchor changes with every step; in rank order one bad first worker would reject everyone for the whole
    training) and `on_disagreement: "mean"`. The cosine with a zero gradient is 0, as in the reference code.
    """

    threshold: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="largest cosine distance kept")
    merge: Literal["mean", "midpoint"] = Field("mean", description="mean of the kept, or repeated midpoint")
    order: Literal["shuffled", "rank"] = Field(
        "shuffled", description="order of the workers; first is the anchor"
    )
    on_disagreement: Literal["skip", "mean"] = Field("skip", description="what to do if nobody agrees")

    def decide(self, gram_SWW: Tensor, present_W: Tensor, moment: Moment) -> Decision:
        """Weights `[S, W]` and whether anybody agreed `[S]`.

        A Python loop over the workers, because the rule is sequential in them; a few operations on `[S, W]`
        each.
        """
        num_segments, num_workers, _ = gram_SWW.shape
        share_SW = torch.zeros_like(gram_SWW[:, 0])  # coefficients of a in the g_i
        dots_SW = torch.zeros_like(share_SW)  # <a, g_i>
        square_S = torch.zeros_like(share_SW[:, 0])  # <a, a>
        count_S = torch.zeros_like(square_S)
        norms_SW = gram_SWW.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        for i in self._order(num_workers, moment):
            scale_S = square_S.clamp(min=0).sqrt() * norms_SW[:, i]
            cosine_S = torch.where(scale_S > 0, dots_SW[:, i] / scale_S, 0.0)
            first_S = count_S == 0
            kept_S = present_W[i] & (first_S | (1.0 - cosine_S <= self.threshold + _ROUNDING))
            kept_S = kept_S.to(gram_SWW.dtype)
            # a <- keep * a + add * g_i, where a worker that is not kept leaves a as it is
            halve_S = kept_S * (~first_S) * (0.5 if self.merge == "midpoint" else 0.0)
            keep_S, add_S = 1.0 - halve_S, kept_S - halve_S
            square_S = (
                keep_S**2 * square_S + 2 * keep_S * add_S * dots_SW[:, i] + add_S**2 * gram_SWW[:, i, i]
            )
            dots_SW = keep_S[:, None] * dots_SW + add_S[:, None] * gram_SWW[:, i]
            share_SW = keep_S[:, None] * share_SW
            share_SW[:, i] += add_S
            count_S = count_S + kept_S
        # With one worker left by `nonfinite: drop` there is nobody who could disagree.
        agreed_S = count_S > present_W.sum().clamp(max=2) - 1
        weights_SW = share_SW / share_SW.sum(1, keepdim=True).clamp(min=0.5)
        if self.on_disagreement == "mean":
            mean_W = present_W.to(weights_SW.dtype) / present_W.sum().clamp(min=1)
            return Decision(
                torch.where(agreed_S[:, None], weights_SW, mean_W), present_W.any().expand(num_segments)
            )
        return Decision(weights_SW * agreed_S[:, None], agreed_S & present_W.any())

    def _order(self, num_workers: int, moment: Moment) -> list[int]:
        if self.order == "rank":
            return list(range(num_workers))
        return [int(i) for i in generator(moment, _ORDER_STREAM).permutation(num_workers)]
