from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.ops.segments import to_device
from ds_gradmix.rules.base import GramianMixing, RngKey
from ds_gradmix.rules.decision import MixingDecision

_ROUNDING = 1e-6  # two equal float32 gradients may come out this far from cosine 1
_ORDER_STREAM = 1  # independent of what a GradientFreeMixing would draw at the same key


class GAF(GramianMixing):
    """Gradient Agreement Filtering: a worker that points elsewhere is left out of the mean.

    Chaubard, Eddy, Kochenderfer 2024, arXiv 2412.18052:

        a <- g_1, c <- 1;  for i = 2..W:  if 1 - cos(a, g_i) <= threshold:  a <- a + g_i, c <- c + 1

    and the gradient is `a/c`, or the step is skipped if nobody agreed (c = 1). All of it follows from the
    Gram matrix: `<a, g_i>` and `<a, a>` are updated from its rows, and no gradient is read twice. `merge:
    "midpoint"` is what the public reference code does, `a <- (a + g_i)/2`. Ours are `order: "shuffled"` (the
    anchor changes with every step; in rank order one bad first worker would reject everyone for the whole
    training) and `on_disagreement: "mean"`. The cosine with a zero gradient is 0, as in the reference code.
    """

    depends_on_order: ClassVar[bool] = True  # the first worker is the anchor

    threshold: float = Field(
        1.0, ge=0, le=2, allow_inf_nan=False, description="largest cosine distance that is kept; 2 keeps all"
    )
    merge: Literal["mean", "midpoint"] = Field(
        "mean", description="the paper's mean of the kept, or its code's repeated midpoint"
    )
    order: Literal["shuffled", "rank"] = Field(
        "shuffled", description="the anchor is another worker in every step, or rank 0"
    )
    on_disagreement: Literal["skip", "mean"] = Field(
        "skip", description="what happens if nobody agrees with the anchor"
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(threshold=0.97, merge="midpoint"), cls(order="rank", on_disagreement="mean")

    def cost(self, num_workers: int) -> RuleCost:
        """Nine small operations for each worker, one after another."""
        return RuleCost(launches=9 * num_workers)

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]` and whether anybody agreed `[S]`.

        A Python loop over the workers, because the rule is sequential in them. On a GPU each operation on
        these few numbers costs a launch, so there are as few as can be: `cos(a, g_i)` is compared as
        `<a, g_i/|g_i|> >= (1 - threshold) |a|`, and what does not depend on `a` is computed before.
        """
        order = list(range(gram_SWW.shape[1]))
        if self.order == "shuffled":
            order = key.generator(_ORDER_STREAM).permutation(len(order)).tolist()
        bias_W = _bias(order, present_W, gram_SWW.dtype)
        squares_SW = gram_SWW.diagonal(dim1=1, dim2=2)
        norms_SW = squares_SW.clamp(min=0).sqrt()
        rows_SWW = torch.where(norms_SW[:, None] > 0, gram_SWW / norms_SW[:, None], 0.0)  # <g_i, g_j/|g_j|>
        twice_SW = 2 * norms_SW
        share_SW = torch.zeros_like(norms_SW)  # coefficients of a in the g_i
        dots_SW = torch.zeros_like(norms_SW)  # <a, g_i/|g_i|>
        square_S = torch.zeros_like(norms_SW[:, 0])  # <a, a>
        endless_S = torch.full_like(square_S, 1e300)  # in place of no <a, a>: every cosine with a is 0
        for i in order:
            length_S = torch.where(square_S > 0, square_S, endless_S).sqrt()
            limit_S = torch.add(bias_W[i], length_S, alpha=1.0 - self.threshold - _ROUNDING)
            kept_S = share_SW[:, i].copy_(dots_SW[:, i] >= limit_S)
            if self.merge == "midpoint":  # a <- (a + g_i)/2, but a <- g_1
                is_first = bias_W[i].isneginf()
                half_S = kept_S * torch.where(is_first, 1.0, 0.5)
                rest_S = torch.where(is_first, 0.0, 1.0 - half_S)
                share_SW = share_SW * rest_S[:, None]
                share_SW[:, i] = half_S
                grown_S = rest_S * twice_SW[:, i] * dots_SW[:, i] + half_S * squares_SW[:, i]
                square_S = rest_S**2 * square_S + half_S * grown_S
                dots_SW = rest_S[:, None] * dots_SW + half_S[:, None] * rows_SWW[:, i]
            else:
                grown_S = torch.addcmul(squares_SW[:, i], twice_SW[:, i], dots_SW[:, i])
                square_S = torch.addcmul(square_S, kept_S, grown_S)
                dots_SW.addcmul_(kept_S[:, None], rows_SWW[:, i])
        return self._decision(share_SW, present_W)

    def _decision(self, share_SW: Tensor, present_W: Tensor) -> MixingDecision:
        # With one worker left by `nonfinite: drop` there is nobody who could disagree.
        agreed_S = (share_SW != 0).sum(1) > present_W.sum().clamp(max=2) - 1
        weights_SW = share_SW / share_SW.sum(1, keepdim=True).clamp(min=0.5)
        if self.on_disagreement == "mean":
            mean_W = present_W.to(weights_SW.dtype) / present_W.sum().clamp(min=1)
            weights_SW = torch.where(agreed_S[:, None], weights_SW, mean_W)
            return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))
        return MixingDecision(weights_SW * agreed_S[:, None], agreed_S & present_W.any())


def _bias(order: list[int], present_W: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to a worker's limit: -inf for the first one present, +inf for the absent, 0 for the others."""
    place_W = to_device(torch.tensor(order).argsort(), present_W.device)
    place_W = torch.where(present_W, place_W, len(order))
    first_W = present_W & (place_W == place_W.min())
    infinity = torch.full_like(present_W, float("inf"), dtype=dtype)
    return torch.where(first_W, -infinity, torch.where(present_W, 0.0, infinity))
