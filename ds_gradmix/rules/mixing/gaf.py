from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.ops.agreement import AgreementFilter
from ds_gradmix.rules.base import GramianMixing, RngKey
from ds_gradmix.rules.decision import Considered, MixingDecision

_ROUNDING = 1e-6  # two equal float32 gradients may come out this far from cosine 1
_LAUNCHES = 3  # the order, the program, and what leaves out a step that nobody agrees on
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
        """One small program that takes the workers one after another."""
        return RuleCost(launches=_LAUNCHES, steps=num_workers)

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]` and whether anybody agreed `[S]`."""
        return self._decide(gram_SWW, present_W, key)[0]

    def consider(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor) -> Considered:
        """The decision, and the least distance of a worker's cosine from the threshold."""
        decision, margin_S = self._decide(gram_SWW, present_W, key)
        return Considered(decision, margin_S, state_KW.expand(len(gram_SWW), -1, -1))

    def _decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> tuple[MixingDecision, Tensor]:
        order = np.arange(gram_SWW.shape[1])
        if self.order == "shuffled":
            order = key.generator(_ORDER_STREAM).permutation(len(order))
        filtered = AgreementFilter(1.0 - self.threshold, _ROUNDING, self.merge == "midpoint")
        weights_SW, agreed_S, margin_S = filtered(gram_SWW, present_W, order)
        if self.on_disagreement == "skip":
            return MixingDecision(weights_SW * agreed_S[:, None], agreed_S), margin_S
        mean_W = present_W.to(weights_SW.dtype) / present_W.sum().clamp(min=1)
        weights_SW = torch.where(agreed_S[:, None], weights_SW, mean_W)
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW))), margin_S
