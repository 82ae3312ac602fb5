"""What of the rules a checkpoint holds: which scaling rule it was, and its running mean."""

from __future__ import annotations

from typing import Any

from ds_gradmix.reduction import Reduction

KEY = "gradmix"


def save(reduction: Reduction, layout: int) -> dict[str, Any]:
    """This rank's part. Draws need no state: they are keyed by DeepSpeed's own step count.

    `layout` stands for where parameters lie in the partitions, which the momentum depends on.
    """
    smoothing = reduction.smoothing
    return {
        "scaling": _scaling(reduction),
        "layout": layout,
        "smoothing": smoothing.state_dict() if smoothing else None,
    }


def load(reduction: Reduction, saved: dict[str, Any] | None, layout: int) -> str | None:
    """Take over a saved state if it fits; else start afresh and tell why.

    `mixing` may change between runs, since no mixing rule has state.
    """
    scaling = _scaling(reduction)
    if saved is None:
        return start_afresh(reduction, "it was made without a gradmix block")
    if saved["scaling"] != scaling:
        return start_afresh(reduction, f"it was made with scaling {saved['scaling']}, not {scaling}")
    if reduction.smoothing is None:
        return (
            None
            if saved["smoothing"] is None
            else f"the checkpoint's momentum of {scaling} is dropped: it is off now"
        )
    if saved["smoothing"] is None:
        return start_afresh(reduction, f"it holds no momentum of {scaling}")
    if saved["layout"] != layout or not reduction.smoothing.load_state_dict(saved["smoothing"]):
        return start_afresh(reduction, f"its momentum of {scaling} is of another partitioning")
    return None


def start_afresh(reduction: Reduction, why: str) -> str:
    """Forget all state; what to warn of."""
    if reduction.smoothing is not None:
        reduction.smoothing.reset()
    return f"the checkpoint has no state for these rules ({why}); they start afresh from here"


def _scaling(reduction: Reduction) -> str | None:
    return type(reduction.block.scaling).__name__ if reduction.block.scaling else None
