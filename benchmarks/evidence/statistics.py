"""Paired comparisons: effect, interval, p-value, Holm's correction, and the power that was to be expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Effect(NamedTuple):
    """A mean difference over pairs, treated minus baseline."""

    mean: float
    half_width: float  # of the 95 % interval, by Student's t
    p: float  # two-sided; 1 where all pairs are equal
    pairs: int


def paired(treated: Sequence[float], baseline: Sequence[float]) -> Effect:
    """Compare pairs of numbers by a paired t-test; ValueError for fewer than two pairs.

    Where all differences are equal, the interval is that number alone: p is 1 if it is 0, else 0.
    """
    difference = np.asarray(treated, dtype=float) - np.asarray(baseline, dtype=float)
    if len(difference) < 2:
        raise ValueError(f"{len(difference)} pairs; at least 2 are needed")
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if error == 0:
        return Effect(mean, 0.0, 1.0 if mean == 0 else 0.0, len(difference))
    degrees = len(difference) - 1
    half_width = float(stats.t.ppf(0.975, degrees)) * error
    return Effect(mean, half_width, float(2 * stats.t.sf(abs(mean / error), degrees)), len(difference))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the same order (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def power(effect: float, deviation: float, pairs: int, level: float = 0.05) -> float:
    """The chance that a paired t-test of so many pairs, whose differences have the standard deviation
    `deviation`, finds a true `effect` at `level`, two-sided.
    """
    if deviation == 0:
        return 1.0 if effect else level
    degrees, shift = pairs - 1, abs(effect) / deviation * math.sqrt(pairs)
    edge = stats.t.ppf(1 - level / 2, degrees)
    return float(stats.nct.sf(edge, degrees, shift) + stats.nct.cdf(-edge, degrees, shift))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float:
    """The standard deviation of paired differences, pooled over cells with means of their own; NaN if none
    has two.
    """
    squares = [np.var(group, ddof=1) * (len(group) - 1) for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in groups if len(group) > 1)
    return math.sqrt(sum(squares) / degrees) if degrees else math.nan
