"""The charts whose horizontal axis is the step and that have a line for each run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ds_gradmix.report.chart import SPECIFIED, Chart, Key, Table, listed, number, plain, whole
from ds_gradmix.report.downsample import part_means, smoothed, thinned
from ds_gradmix.report.read import Run, Series

NUM_COLORS = 8  # --line-0 and so on in page.css
TABLE_ROWS = 20
DASHES = ("solid", "dash", "dot")
SMOOTHED_FROM = 100  # points


class Kind(NamedTuple):
    """A chart of charts.json: what it is called, the numbers it shows, and what its vertical axis says."""

    name: str
    title: str
    note: str
    axis: str
    numbers: dict[str, str]  # keys of series, and what they are called
    format: str  # for printf, or of Bokeh's NumeralTickFormatter; without one Bokeh chooses
    log: bool
    noisy: bool  # a smoothed line helps


def sections() -> list[tuple[str, list[Kind]]]:
    """The titles of the page's sections of line charts, with their charts."""
    return [(each["title"], [Kind(**chart) for chart in each["charts"]]) for each in SPECIFIED["lines"]]


class _Line(NamedTuple):
    label: str
    series: Series
    color: str
    dash: str
    run: int  # its place among the runs, by which the page hides it


def line_chart(kind: Kind, runs: Sequence[Run]) -> Chart | None:
    """The chart of a kind with the lines of all runs; None where no run has its numbers."""
    lines = _lines(kind, runs)
    if not lines:
        return None
    drawn = [_drawn(kind, line) for line in lines]
    keys = [Key(line.label, line.color, line.dash) for line in lines]
    smooth = kind.noisy and any(len(line.series.steps_T) >= SMOOTHED_FROM for line in lines)
    note = "Thick: means over a hundredth of the run. Thin: every value." if smooth else ""
    return Chart(
        kind.name,
        kind.title,
        f"{kind.note} {note}".strip(),
        " ".join(_words(line) for line in lines),
        {"lines": drawn, "axis": kind.axis, "format": kind.format, "log": kind.log},
        _table(kind, lines),
        keys,
    )


def _lines(kind: Kind, runs: Sequence[Run]) -> list[_Line]:
    """Colours tell runs apart, or, where there is one, its numbers; dashes tell numbers apart as well."""
    lines = []
    for place, run in enumerate(runs):
        for other, (key, label) in enumerate(kind.numbers.items()):
            series = run.series.get(key)
            if series is None or series.values.ndim > 1:
                continue
            if kind.log:
                above = series.values > 0
                series = Series(series.steps_T[above], series.values[above])
            if not len(series.steps_T):
                continue
            color = f"var(--line-{(place if len(runs) > 1 else other) % NUM_COLORS})"
            whose = f"{run.name}: {label}" if len(runs) > 1 else label
            lines.append(_Line(whose, series, color, DASHES[other], place))
    return lines


def _drawn(kind: Kind, line: _Line) -> dict[str, Any]:
    """The values, and their smoothed line where that helps; few values have marks."""
    about = {"name": plain(line.label), "run": line.run, "color": line.color, "dash": line.dash}
    enough = len(line.series.steps_T) >= SMOOTHED_FROM
    few = (kind.noisy and not enough) or len(line.series.steps_T) == 1
    mean = _points(thinned(smoothed(line.series))) if kind.noisy and enough else None
    return about | _points(thinned(line.series)) | {"marks": few, "smoothed": mean}


def _points(series: Series) -> dict[str, Any]:
    return {"x": listed(series.steps_T), "y": listed(series.values)}


def _words(line: _Line) -> str:
    steps_T, values = line.series
    least, greatest = int(values.argmin()), int(values.argmax())
    return (
        f"{line.label}: {number(values[0])} at step {whole(steps_T[0])}, {number(values[-1])} at step"
        f" {whole(steps_T[-1])}; least {number(values[least])} at step {whole(steps_T[least])},"
        f" greatest {number(values[greatest])} at step {whole(steps_T[greatest])}."
    )


def _table(kind: Kind, lines: Sequence[_Line]) -> Table:
    first = min(line.series.steps_T[0] for line in lines)
    last = max(line.series.steps_T[-1] for line in lines)
    edges = np.unique(np.linspace(first, last + 1, TABLE_ROWS + 1).round())
    means = [part_means(line.series, edges) for line in lines]
    rows = [
        [f"{whole(edges[i])} to {whole(edges[i + 1] - 1)}", *(number(mean[i]) for mean in means)]
        for i in range(len(edges) - 1)
    ]
    caption = f"{kind.title}: means over equal parts of the run"
    return Table(
        caption, ["steps", *(line.label for line in lines)], [row for row in rows if set(row[1:]) != {"–"}]
    )
