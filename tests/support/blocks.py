"""Gradmix blocks that several test files use."""

from __future__ import annotations

from typing import Any

ONE_OWNER = 700  # elements in a bucket: regression's parameters larger than it, and buckets of one owner
TINY = {"tile_bytes": 4096}  # many tiles, although models are small
# Several tiles of the language model, which is larger; and as many where each takes more memory.
SMALL, SMALL_BY_PARAMETER = {"tile_bytes": 8192}, {"tile_bytes": 16384}
GAF: dict[str, Any] = {"mixing": {"type": "GAF"}}
SKETCH: dict[str, Any] = {"gram": {"sketch": 100}}  # many blocks, although models are small
SUMMED: dict[str, Any] = {"transport": "exchange"}
MIX: dict[str, Any] = {"mixing": {"type": "GradientMix"}}
VRGD: dict[str, Any] = {"scaling": {"type": "VRGD"}}
# With few workers left, ratios amplify the rounding of the model's own gradients; less with this gamma.
ROUGH_VRGD: dict[str, Any] = {"scaling": {"type": "VRGD", "params": {"gamma": 0.5}}}
BOTH: dict[str, Any] = {**GAF, **ROUGH_VRGD}
SMOOTH: dict[str, Any] = {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}}
# Decided by parameter, so that what a bucket holds does not matter.
BY_PARAMETER: dict[str, Any] = {
    "mixing": {"type": "GAF", "params": {"threshold": 0.87}},
    "scope": "parameter",
    **SMALL_BY_PARAMETER,
}


def noise(**params: Any) -> dict[str, Any]:
    return {"extrapolation": {"type": "Noise", "params": params}}


def past(**params: Any) -> dict[str, Any]:
    """Extrapolation by the past gradient."""
    return {"extrapolation": {"type": "PastGradient", "params": params}}
