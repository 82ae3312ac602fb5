"""From a rule and what is known of the workers to their weights, and what that says about the workers.

Shared by the exchange, which decides on one rank and tells the others, and by `combine`, which decides alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.mixing.rule import Decision, GramMixing, Moment
from ds_gradmix.segments import to_device


class Verdict(NamedTuple):
    """A decision with what is worth telling about it."""

    weights_SW: Tensor  # float64
    agreed_S: Tensor  # float64, 1 or 0
    cosine_S: Tensor  # float64, mean cosine between different workers; NaN where no Gram matrix was needed

    def packed(self) -> Tensor:
        """One `[S, W + 2]` tensor, to be sent."""
        return torch.cat([self.weights_SW, self.agreed_S[:, None], self.cosine_S[:, None]], dim=1)

    @staticmethod
    def unpacked(packed: Tensor) -> Verdict:
        """The inverse of `packed`."""
        return Verdict(packed[:, :-2], packed[:, -2], packed[:, -1])


def known_verdict(weights_SW: Tensor, present_W: Tensor) -> Verdict:
    """Weights drawn before the gradients are known (float64, on the host), renormalised over the workers
    present.
    """
    weights_SW = to_device(weights_SW, present_W.device) * present_W
    total_S = weights_SW.sum(1)
    # A draw may give (numerically) everything to a worker that is not there; then the others share equally.
    equal_W = present_W.to(weights_SW.dtype) / present_W.sum().clamp(min=1)
    weights_SW = torch.where(total_S[:, None] > 0, weights_SW / total_S[:, None], equal_W)
    agreed_S = present_W.any().to(torch.float64).expand(len(weights_SW))
    return Verdict(weights_SW, agreed_S, torch.full_like(total_S, float("nan")))


def gram_verdict(rule: GramMixing, moment: Moment, gram_SWW: Tensor, present_W: Tensor) -> Verdict:
    """Weights from Gram matrices; where one of them is not finite, NaN.

    A filter that quietly dropped the worker with the Inf would hide an overflow from dynamic loss scaling, so
    what is not finite stays visible: the combined gradient becomes NaN, as the mean would.
    """
    decision: Decision = rule.decide(gram_SWW, present_W, moment)
    finite_S = gram_SWW.isfinite().all(-1).all(-1)
    weights_SW = torch.where(finite_S[:, None], decision.weights_SW, float("nan"))
    agreed_S = (decision.agreed_S | ~finite_S).to(torch.float64)
    return Verdict(weights_SW, agreed_S, mean_cosine(gram_SWW))


def mean_cosine(gram_SWW: Tensor) -> Tensor:
    """Mean over pairs of different workers of `cos(g_i, g_j)`, `[S]`; 0 with a zero gradient."""
    num_workers = gram_SWW.shape[1]
    norms_SW = gram_SWW.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    scale_SWW = norms_SW[:, :, None] * norms_SW[:, None, :]
    cosines_SWW = torch.where(scale_SWW > 0, gram_SWW / scale_SWW, 0.0)
    pairs_S = cosines_SWW.sum((1, 2)) - cosines_SWW.diagonal(dim1=1, dim2=2).sum(1)
    return pairs_S / max(num_workers * (num_workers - 1), 1)
