"""What a checkpoint holds of the rules: state of a mixing rule, factor momentum, a worker's past gradient."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.mixing_state import MixingState, load_states
from ds_gradmix.rules import Rule

CHECKPOINT_KEY = "gradmix"


class WorkerWeights(Protocol):
    """The extrapolated weights (weights/extrapolated.py), as the reduction sees them."""

    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """Take note of a worker's own gradients before they are reduced."""

    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced."""

    def post_step(self, *, keep: bool) -> None:
        """The optimizer has taken the step or left it out."""

    @property
    def offset_ratio(self) -> float | None:
        """The length of the offset by that of the weights, if it was measured."""

    def forget(self) -> None:
        """Start afresh, since somebody else has written the parameters."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a checkpoint's state, if it fits."""


class Measured(Protocol):
    """What telemetry keeps over the steps (watch.py)."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Take over a checkpoint's if it fits, or start afresh."""


@dataclass
class RuleState:
    """The rules' state on this rank. Random draws need none: they are keyed by DeepSpeed's own step count."""

    config: GradmixConfig
    mixing: Sequence[MixingState]  # of every group of workers; all of them without numbers for most rules
    momentum: FactorMomentum | None
    weights: WorkerWeights | None
    layout: int  # a fingerprint of where parameters lie in the partitions, which all state depends on
    telemetry: Measured | None = None  # whose running means are kept, too
    loads: int = 0  # checkpoints loaded with optimizer states

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        return {
            "mixing": _name(self.config.mixing),
            "mixing_states": [state.values_KW for state in self.mixing],
            "scaling": _name(self.config.scaling),
            "extrapolation": _name(self.config.extrapolation),
            "layout": self.layout,
            "momentum": self.momentum.state_dict() if self.momentum else None,
            "weights": self.weights.state_dict() if self.weights else None,
            "telemetry": self.telemetry.state_dict() if self.telemetry else None,
        }

    def load(self, saved: dict[str, Any] | None, why: str) -> str | None:
        """Take over what `state_dict` returned where it fits, and start afresh where it does not, or where it
        is None for the reason `why`; returns what to warn of. A `mixing` rule without state may change.
        """
        self.loads += 1
        if self.momentum is not None:
            self.momentum.reset()
        load_states(self.mixing, [])
        if self.telemetry is not None:
            self.telemetry.load_state_dict(None)
        if self.weights is not None:
            self.weights.forget()
        if found := "; ".join([why] if saved is None else self._load(saved)):
            return f"the checkpoint has not all state of these rules ({found}); what it has not starts afresh"
        return None

    def _load(self, saved: dict[str, Any]) -> Iterator[str]:
        """Take over what fits; the reasons why the rest does not."""
        if self.telemetry is not None:
            self.telemetry.load_state_dict(saved.get("telemetry"))
        mixing, states = _name(self.config.mixing), saved["mixing_states"]
        if any(map(len, states)) and saved["mixing"] != mixing:
            yield f"it has state of mixing {saved['mixing']}, which is {mixing} now"
        elif any(len(state.values_KW) for state in self.mixing) and not load_states(self.mixing, states):
            yield f"it has no state of mixing {mixing} for as many workers"
        if saved["layout"] != self.layout:
            yield "it is of another partitioning"
            return
        scaling, extrapolation = _name(self.config.scaling), _name(self.config.extrapolation)
        if saved["scaling"] != scaling:
            yield f"it was made with scaling {saved['scaling']}, not {scaling}"
        elif self.momentum is None and saved["momentum"] is not None:
            yield f"its momentum of {scaling} is dropped, which is off now"
        elif self.momentum is not None and saved["momentum"] is None:
            yield f"it holds no momentum of {scaling}"
        elif self.momentum is not None and not self.momentum.load_state_dict(saved["momentum"]):
            yield f"its momentum of {scaling} is of another partitioning"
        if saved["extrapolation"] != extrapolation:
            yield f"it was made with extrapolation {saved['extrapolation']}, not {extrapolation}"
        elif self.weights is not None and not self.weights.load_state_dict(saved["weights"]):
            yield "its past gradients are of another partitioning, or of workers of another size"


def saved_by(state_dict_list: Any, rank: int) -> tuple[dict[str, Any] | None, str]:
    """A rank's part of a ZeRO optimizer's checkpoint, given as DeepSpeed gives it, and why there is none."""
    if state_dict_list is None:
        return None, "a universal checkpoint does not hold it"
    return state_dict_list[rank].get(CHECKPOINT_KEY), "it was made without a gradmix block"


def _name(rule: Rule | None) -> str:
    return "none" if rule is None else rule.type_name()
