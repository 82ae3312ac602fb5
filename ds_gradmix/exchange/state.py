"""What a checkpoint holds of the rules: factor momentum, and a worker's past gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor

from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.factor_momentum import FactorMomentum

CHECKPOINT_KEY = "gradmix"


class WorkerWeights(Protocol):
    """The extrapolated weights (weights/extrapolated.py), as the reduction sees them."""

    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """Take note of a worker's own gradients before they are reduced."""

    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced."""

    def post_step(self, *, keep: bool) -> None:
        """The optimizer has taken the step or left it out."""

    def forget(self) -> None:
        """Start afresh, since somebody else has written the parameters."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a checkpoint's state, if it fits."""


class RuleState:
    """This rank's state of the rules. Random draws need none: they are keyed by DeepSpeed's own step count.

    Args:
        config: the rules.
        momentum: of a scaling rule's factors, if any.
        weights: the extrapolated weights, if any.
        layout: a fingerprint of where parameters lie in the partitions, which all state depends on.
    """

    def __init__(
        self,
        config: GradmixConfig,
        momentum: FactorMomentum | None,
        weights: WorkerWeights | None,
        layout: int,
    ) -> None:
        self.loads = 0  # checkpoints loaded with optimizer states
        self._scaling = _name(config.scaling)
        self._extrapolation = _name(config.extrapolation)
        self._momentum = momentum
        self._weights = weights
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        return {
            "scaling": self._scaling,
            "extrapolation": self._extrapolation,
            "layout": self._layout,
            "momentum": self._momentum.state_dict() if self._momentum else None,
            "weights": self._weights.state_dict() if self._weights else None,
        }

    def load(self, saved: dict[str, Any] | None, why: str) -> str | None:
        """Take over a saved state where it fits, and start afresh where it does not.

        `mixing` may change between runs, since no mixing rule has state.

        Args:
            saved: what `state_dict` returned, or None.
            why: the reason, if it is None.

        Returns:
            What to warn of, or None.
        """
        self.loads += 1
        if self._momentum is not None:
            self._momentum.reset()
        if self._weights is not None:
            self._weights.forget()
        reasons: list[str | None] = [why]
        if saved is not None and saved["layout"] != self._layout:
            reasons = ["it is of another partitioning"]
        elif saved is not None:
            reasons = [self._load_momentum(saved), self._load_weights(saved)]
        if found := "; ".join(reason for reason in reasons if reason):
            return f"the checkpoint has not all state of these rules ({found}); what it has not starts afresh"
        return None

    def _load_momentum(self, saved: dict[str, Any]) -> str | None:
        if saved["scaling"] != self._scaling:
            return f"it was made with scaling {saved['scaling']}, not {self._scaling}"
        if self._momentum is None and saved["momentum"] is None:
            return None
        if self._momentum is None:
            return f"its momentum of {self._scaling} is dropped, which is off now"
        if saved["momentum"] is None:
            return f"it holds no momentum of {self._scaling}"
        fits = self._momentum.load_state_dict(saved["momentum"])
        return None if fits else f"its momentum of {self._scaling} is of another partitioning"

    def _load_weights(self, saved: dict[str, Any]) -> str | None:
        if saved["extrapolation"] != self._extrapolation:
            return f"it was made with extrapolation {saved['extrapolation']}, not {self._extrapolation}"
        if self._weights is None or self._weights.load_state_dict(saved["weights"]):
            return None
        return "its past gradients are of another partitioning, or of workers of another size"


def _name(rule: BaseModel | None) -> str:
    return "none" if rule is None else type(rule).__name__
