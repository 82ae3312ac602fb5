"""The numbers of a reading by their names, for statistics, monitors and lines of a file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ds_gradmix.telemetry.measures import Reading


def scalars(reading: Reading, tokens_per_sample: int | None) -> dict[str, float]:
    """The numbers on all workers together; those that are not known are left out."""
    found = {"mean_cosine": reading.mean_cosine, "min_cosine": reading.min_cosine}
    if reading.steps == 0 or len(reading.norm) < 2:
        return {}
    found |= {
        "trace_covariance": reading.trace_covariance,
        "squared_gradient": reading.squared_gradient,
        "noise_scale": reading.noise_scale,
    }
    if tokens_per_sample is not None:
        found["noise_scale_tokens"] = reading.noise_scale * tokens_per_sample
    return {name: value for name, value in found.items() if math.isfinite(value)}


def by_worker(reading: Reading | None, kept: Sequence[float]) -> dict[str, list[float]]:
    """The numbers of each worker."""
    found = {"worker_kept": list(kept)}
    if reading is not None:
        found = {"worker_norm": reading.norm, "worker_agreement": reading.agreement} | found
    return found


def flattened(lists: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`{"worker_norm": [1.5, ...]}` as `{"worker_norm/0": 1.5, ...}`."""
    return {f"{name}/{i}": value for name, values in lists.items() for i, value in enumerate(values)}


def finite(value: Any) -> Any:
    """What JSON can hold: null in place of NaN and Inf."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
