"""What belongs to an optimizer step as a whole, however many buckets and groups it is reduced in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.step_stats import StepStats
from ds_gradmix.log import logger


class Steps:
    """The step in progress: its number, what is decided in it, and the state that its end moves on.

    Args:
        block: the rules.
        workers: the data-parallel replicas.
        model: all ranks that hold parts of the same model, whatever the parallelism.
        alike: whether the workers take part in all of the model's decisions.
        owned: elements this rank owns in each of the optimizer's parameter groups.
        device: where gradients are.
    """

    def __init__(
        self,
        block: GradmixConfig,
        workers: WorkerGroup,
        model: RankGroup,
        owned: Sequence[int],
        device: torch.device,
        *,
        alike: bool = True,
    ) -> None:
        self.step = 0  # steps taken before it; set by the engine's seam before each reduction
        self.numbers: Mapping[str, float] = {}  # what was decided in the last step
        self.record = StepStats(device)
        self.smoothing: FactorMomentum | None = None
        scaling = block.scaling
        if scaling is not None and scaling.factor_momentum > 0 and workers.size > 1:
            self.smoothing = FactorMomentum(scaling.factor_momentum, scaling.idle_factor, owned, device)
        self._scales = scaling is not None
        self._workers = workers
        self._model = model
        self._alike = alike

    def finish(self) -> bool:
        """The step's gradients are reduced: read what was decided. Whether the step is to be skipped."""
        self.numbers = self.record.read(self._workers, self._model, alike=self._alike, scaled=self._scales)
        drops = self.numbers.get("dropped_workers", 0.0)
        if drops > 0 and self._model.is_first:
            logger.warning(
                f"ds_gradmix: step {self.step + 1}: left a worker out of {drops:.0f} reduction(s), because "
                "its gradient was not finite"
            )
        return self.numbers.get("skipped", 0.0) > 0

    def settle(self, *, taken: bool) -> None:
        """The optimizer has taken the step, or left it out."""
        if self.smoothing is not None:
            if taken:
                self.smoothing.commit()
            else:
                self.smoothing.discard()
        if self.numbers:
            self.numbers = {**self.numbers, "skipped": float(not taken)}
