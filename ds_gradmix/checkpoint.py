"""What of the rules a checkpoint holds: which scaling rule it was, and its running mean."""

from __future__ import annotations

from typing import Any

from ds_gradmix.reduction import Reduction

KEY = "gradmix"


def save(reduction: Reduction) -> dict[str, Any]:
    """This rank's part. Draws need no state: they are keyed by DeepSpeed's own step count."""
    smoothing = reduction.smoothing
    return {
        "mixing": type(reduction.block.mixing).__name__,
        "scaling": type(reduction.block.scaling).__name__ if reduction.block.scaling else None,
        "smoothing": smoothing.state_dict() if smoothing else None,
    }


def load(reduction: Reduction, saved: dict[str, Any] | None) -> str | None:
    """Take over a saved state if it fits; else keep a fresh one and tell why.

    `mixing` may change between runs, since no mixing rule has state.
    """
    scaling = type(reduction.block.scaling).__name__ if reduction.block.scaling else None
    if reduction.smoothing is not None:
        reduction.smoothing.reset()
    if saved is None:
        return "the checkpoint was made without a gradmix block; the rules start afresh from here"
    if saved["scaling"] != scaling:
        before = saved["scaling"]
        return (
            f"the checkpoint was made with scaling {before}, not {scaling}; scaling starts afresh from here"
        )
    if reduction.smoothing is None:
        if saved["smoothing"] is not None:
            return f"the checkpoint holds {scaling}'s momentum, which is off now; it is dropped"
        return None
    if saved["smoothing"] is None:
        return f"the checkpoint holds no momentum of {scaling}; it starts afresh from here"
    if not reduction.smoothing.load_state_dict(saved["smoothing"]):
        return (
            f"the checkpoint's momentum of {scaling} is of another partitioning; it starts afresh from here"
        )
    return None
