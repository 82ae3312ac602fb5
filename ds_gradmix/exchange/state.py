"""What of the rules a checkpoint holds: a scaling rule's running mean, and the gradient a worker looks ahead
by.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights

KEY = "gradmix"


def save(
    block: GradmixConfig, smoothing: FactorMomentum | None, lookahead: ExtrapolatedWeights | None, layout: int
) -> dict[str, Any]:
    """This rank's part. Draws need no state: they are keyed by DeepSpeed's own step count.

    `layout` stands for where parameters lie in the partitions, which all state depends on.
    """
    return {
        "scaling": _name(block.scaling),
        "extrapolation": _name(block.extrapolation),
        "layout": layout,
        "smoothing": smoothing.state_dict() if smoothing else None,
        "lookahead": lookahead.state_dict() if lookahead else None,
    }


def load(
    block: GradmixConfig,
    smoothing: FactorMomentum | None,
    lookahead: ExtrapolatedWeights | None,
    saved: dict[str, Any] | None,
    layout: int,
    why: str,
) -> str | None:
    """Take over a saved state where it fits, and start afresh where not; what to warn of.

    `mixing` may change between runs, since no mixing rule has state. `why` tells why `saved` is None.
    """
    if smoothing is not None:
        smoothing.reset()
    if lookahead is not None:
        lookahead.forget()
    if saved is None:
        return _afresh(why)
    if saved["layout"] != layout:
        return _afresh("it is of another partitioning")
    told = [_load_smoothing(block, smoothing, saved), _load_lookahead(block, lookahead, saved)]
    return _afresh("; ".join(reasons)) if (reasons := [reason for reason in told if reason]) else None


def _load_smoothing(
    block: GradmixConfig, smoothing: FactorMomentum | None, saved: dict[str, Any]
) -> str | None:
    scaling = _name(block.scaling)
    if saved["scaling"] != scaling:
        return f"it was made with scaling {saved['scaling']}, not {scaling}"
    if smoothing is None:
        return (
            None if saved["smoothing"] is None else f"its momentum of {scaling} is dropped, which is off now"
        )
    if saved["smoothing"] is None:
        return f"it holds no momentum of {scaling}"
    fits = smoothing.load_state_dict(saved["smoothing"])
    return None if fits else f"its momentum of {scaling} is of another partitioning"


def _load_lookahead(
    block: GradmixConfig, lookahead: ExtrapolatedWeights | None, saved: dict[str, Any]
) -> str | None:
    extrapolation = _name(block.extrapolation)
    if saved["extrapolation"] != extrapolation:
        return f"it was made with extrapolation {saved['extrapolation']}, not {extrapolation}"
    if lookahead is None or lookahead.load_state_dict(saved["lookahead"]):
        return None
    return "its past gradients are of another partitioning, or of workers of another size"


def _afresh(why: str) -> str:
    return f"the checkpoint has not all state of these rules ({why}); what it has not starts afresh from here"


def _name(rule: BaseModel | None) -> str:
    return "none" if rule is None else type(rule).__name__
