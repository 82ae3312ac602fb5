"""README's table: which rule for which trouble, and the cells of docs/evidence.md that it goes by."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.evidence.results import Results
from benchmarks.evidence.statistics import Effect
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import Comparison, comparisons

Row = tuple[str, str, str]
GUARD = "[`Guard`](docs/rules.md#guard)"
NOISE, SIGN, SCALED = "noise of 100 times the norm", "negative gradient", "scaled by 1000"
SMALL_DATA = "Adam, batch 256, 40 steps"


def markdown() -> str:
    """The table, by tuned learning rates; nothing before the studies are trained."""
    lines = ["| trouble | rule | measured |", "|---|---|---|"]
    try:
        lines += [f"| {trouble} | {rule} | {measured} |" for trouble, rule, measured in _rows()]
    except KeyError as missing:
        return f"Not measured yet: {missing.args[0]}, by `make evidence`.\n"
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[Row]:
    bad, kinds, offsets = map(_cells, ("bad_workers", "kinds", "extrapolation"))
    yield (
        "a worker trains on something else: a broken GPU, wrong data, a bug",
        f"{GUARD}: the mean, without that worker",
        f"noise: {told(bad[NOISE, 'Guard'])}; wrong sign: {told(bad[SIGN, 'Guard'])}; "
        f"nobody bad: {number(bad['nobody bad', 'Guard'].effect)}",
    )
    yield (
        "the same, and you only want to know",
        '[`"telemetry": true`](docs/telemetry.md): names its rank and host',
        "changes nothing",
    )
    first = "2 workers for each of 4 kinds"
    setting = "Guard, agreement -0.5, smoothing 0.98"
    yield (
        "the same, and workers read data of different kinds",
        '`Guard` with `"agreement": -0.5, "smoothing": 0.98`',
        f"nobody bad: {number(kinds[first, setting].effect)}, `Guard` as it is "
        f"{number(kinds[first, 'Guard'].effect)}",
    )
    dropped = bad["NaN", "Mean, drop"]
    ends = "trains on; the mean ends in NaN" if dropped.diverged[0] == 0 else "may end in NaN still"
    yield (
        "a worker's gradients are Inf or NaN now and then",
        '`"nonfinite": "drop"` with any rule, also the mean',
        ends,
    )
    yield (
        "some workers may send anything",
        "`GeometricMedian`, `MultiKrum`, `Krum`",
        f"`GeometricMedian`, noise: {told(bad[NOISE, 'GeometricMedian'])}; wrong sign: "
        f"{told(bad[SIGN, 'GeometricMedian'])}",
    )
    yield (
        "gradients far too long",
        "`Guard`, `NormClip`, `GeometricMedian`",
        "times 1000: " + ", ".join(told(bad[SCALED, r]) for r in ("Guard", "NormClip", "GeometricMedian")),
    )
    layerwise = offsets[SMALL_DATA, "PastGradient, layer-wise 0.02"]
    yield (
        "little data, large batches",
        "`PastGradient`, layer-wise",
        f"digits with Adam, test error: {told(layerwise)} %; on text none told",
    )


def _cells(study: str) -> dict[tuple[str, str], Comparison]:
    found = comparisons(Results(STUDIES[study]))
    return {(c.cell.setting, c.cell.rule): c for c in found if c.tuned}


def number(effect: Effect) -> str:
    return f"{effect.mean:+.3f} ± {effect.half_width:.3f}".replace("-", "−")


def told(comparison: Comparison) -> str:
    """The difference, if it is told apart from none after Holm's correction."""
    effect = comparison.effect
    text = f"{effect.mean:+.2f} ± {effect.half_width:.2f}".replace("-", "−")
    return text if comparison.holm_p < 0.05 else "none told"
