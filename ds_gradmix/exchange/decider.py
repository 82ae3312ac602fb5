"""Decisions that are taken without the gradients: which workers count, and weights drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.bucket import ParamInfo, ParamSpan
from ds_gradmix.rules import GradientFreeMixing, MixingDecision, RngKey
from ds_gradmix.rules.apply import decide_without_gradients


class Decider:
    """Decides over one group of workers.

    Args:
        config: the rules.
        workers: the group.
        infos: of the optimizer's parameters, by position.
        device: where gradients are.
    """

    def __init__(
        self, config: GradmixConfig, workers: WorkerGroup, infos: Sequence[ParamInfo], device: torch.device
    ) -> None:
        self._config = config
        self._workers = workers
        self._infos = infos
        self._num_draws = 1 + max((info.draw for info in infos), default=0)
        self._everyone_W = torch.ones(workers.size, dtype=torch.bool, device=device)
        self._drawn: tuple[RngKey, npt.NDArray[np.float64]] | None = None

    def present(self, grads: Sequence[Tensor], group: RankGroup) -> Tensor:
        """Which workers count, `[W]`; what is not finite in this one's gradients is zeroed if it does not.

        Gradients that ranks of the group hold of one worker are parts of it: one bad part is enough.
        """
        if self._config.nonfinite == "propagate":
            return self._everyone_W
        finite = self._everyone_W[0].double()
        for grad in grads:
            largest = torch.linalg.vector_norm(grad, float("inf")) if grad.numel() else grad.new_zeros(())
            finite = finite * largest.isfinite()
            grad.nan_to_num_(0.0, 0.0, 0.0)
        bad_W = torch.zeros_like(self._everyone_W, dtype=torch.float64)
        bad_W[self._workers.number] = 1.0 - finite
        group.all_reduce(bad_W)  # whole numbers: exact, so the same on every rank
        return bad_W == 0

    def draw(self, key: RngKey) -> npt.NDArray[np.float64]:
        """The step's weights, drawn once for all parameters, `[1, W]` or one row for each draw."""
        if self._drawn is None or self._drawn[0] != key:
            rule = self._config.mixing
            assert isinstance(rule, GradientFreeMixing)
            self._drawn = (key, rule.weights(key, self._workers.size, self._num_draws))
        return self._drawn[1]

    def decide(self, spans: Sequence[ParamSpan], present_W: Tensor, key: RngKey) -> MixingDecision:
        """The weights of gradients, from what was drawn."""
        weights_RW = self.draw(key)
        if len(weights_RW) > 1:
            weights_RW = weights_RW[[self._infos[span.param].draw for span in spans]]
        return decide_without_gradients(torch.from_numpy(weights_RW), present_W)
