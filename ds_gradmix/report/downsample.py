"""Fewer points that show the same: the page of a long run must open at once, and no spike may be lost."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ds_gradmix.report.read import Floats, Series

MAX_POINTS = 2000  # of a line
MAX_COLUMNS = 360  # of a heat map
OUTLIER = 6.0  # robust standard deviations from the row's median within a column


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """The first and the last point, and of each of `most / 2 - 1` equal parts the least and the greatest."""
    total = len(series.steps_T)
    if total <= most:
        return series
    kept = {0, total - 1}
    edges = np.linspace(0, total, most // 2).astype(int)
    for begin, end in pairwise(edges):
        part = series.values[begin:end]
        kept |= {int(begin + part.argmin()), int(begin + part.argmax())}
    chosen = np.array(sorted(kept))
    return Series(series.steps_T[chosen], series.values[chosen])


def smoothed(series: Series, share: float = 0.01) -> Series:
    """The mean of each value and its neighbours, over this share of the run; of fewer at the ends."""
    total = len(series.values)
    places = np.arange(total)
    most = round(total * share / 2)
    reach = np.clip(np.minimum(places, total - 1 - places), most // 4, most)
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    begins, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, total)
    return Series(series.steps_T, (sums[ends] - sums[begins]) / (ends - begins))


def part_means(series: Series, edges: Floats) -> Floats:
    """The mean of the values between neighbouring edges, which are steps; NaN where there are none."""
    places = np.searchsorted(series.steps_T, edges)
    sums = np.concatenate([[0.0], np.cumsum(series.values)])[places]
    counts = np.diff(places)
    return np.where(counts > 0, np.diff(sums) / np.maximum(counts, 1), np.nan)


def columns(series: Series) -> tuple[float, float, Floats]:
    """For a heat map of (T, rows): the first column's step, their width, and cells (rows, columns).

    A cell is the mean of its row's values in its column's steps, or the outermost where that lies more
    than OUTLIER robust standard deviations from their median: a fault of one step is seen in 100,000.
    """
    steps_T, values = series
    first, span = float(steps_T[0]), float(steps_T[-1] - steps_T[0])
    if not span:
        return first, 1.0, values.T
    num = min(MAX_COLUMNS, len(steps_T))
    gaps = np.diff(steps_T)
    # Columns no narrower than the usual distance of lines, or some stay empty where lines are far apart.
    width = max(span / max(num - 1, 1), float(max(gaps[gaps <= span / 20], default=0)))
    places_T = np.rint((steps_T - first) / width).astype(int)
    cells = np.full((values.shape[1], places_T[-1] + 1), np.nan)
    for place in np.unique(places_T):
        begin, end = np.searchsorted(places_T, [place, place + 1])
        cells[:, place] = _cell(values[begin:end])
    return first, width, cells


def _cell(values: Floats) -> Floats:
    """One number for each column of (T, rows)."""
    known = np.isfinite(values)
    means: Floats = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
    some = known.any(0)
    filled = np.where(known, values, means)
    median = np.median(filled, 0)
    distance = np.abs(filled - median)
    outermost = filled[distance.argmax(0), np.arange(values.shape[1])]
    # Also of all rows at once, since few values may lie close together by chance.
    spread = 1.4826 * np.maximum(np.median(distance, 0), np.median(distance))
    outlying = distance.max(0) > OUTLIER * spread + 1e-9
    means[~some] = np.nan
    outlying &= some & (len(values) > 2)
    means[outlying] = outermost[outlying]
    return means


def most_unusual(cells: Floats, most: int) -> NDArray[np.int64]:
    """The rows of a heat map to show if they are more than `most`: those furthest from the others."""
    if len(cells) <= most:
        return np.arange(len(cells))
    known = np.isfinite(cells)
    typical = np.nanmedian(np.where(known.any(0), cells, 0.0), 0)
    strays = np.where(known, np.abs(cells - typical), 0.0).max(1)
    return np.sort(np.argsort(-strays, kind="stable")[:most])
