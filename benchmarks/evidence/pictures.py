"""Draws studies' effects with their intervals: docs/pictures/evidence_STUDY.svg.

python -m benchmarks.evidence.pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.evidence import ROOT
from benchmarks.evidence.results import Results
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import Comparison, comparisons

PICTURES = ROOT / "docs" / "pictures"
SHOWN = ("bad_workers", "kinds", "gaf", "vrgd", "extrapolation")  # in docs/evidence.md
GREY, COLORS = "#808080", {True: "#3a76c4", False: "#d98032"}  # to be seen on white and on black


def path(study: str) -> Path:
    """The picture of a study."""
    return PICTURES / f"evidence_{study}.svg"


def draw(results: Results, found: Sequence[Comparison]) -> None:
    """A row for each cell; tuned learning rates above, the fixed one below."""
    matplotlib.rcParams |= {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}
    matplotlib.rcParams |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    )
    cells = [cell for cell in results.study.cells if any(c.cell == cell for c in found)]
    rows = {cell: -row for row, cell in enumerate(cells)}
    figure, axes = pyplot.subplots(figsize=(7.6, 0.8 + 0.2 * len(cells)), layout="constrained")
    for tuned, label in ((True, "learning rates tuned"), (False, "one fixed learning rate")):
        chosen = [c for c in found if c.tuned == tuned and not c.repeats]
        axes.errorbar(
            [c.effect.mean for c in chosen],
            [rows[c.cell] + (0.17 if tuned else -0.17) for c in chosen],
            xerr=[c.effect.half_width for c in chosen],
            fmt="o" if tuned else "s",
            ms=3,
            lw=1,
            color=COLORS[tuned],
            label=label,
        )
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_yticks(list(rows.values()), [f"{cell.setting}: {cell.rule}" for cell in cells])
    linear = results.study.matters * 5
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_xlabel(
        f"{results.study.unit}, rule minus baseline, 95 % intervals; left is better\n"
        f"(logarithmic beyond {linear:g})"
    )
    axes.set_ylim(-len(cells) + 0.4, 0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    figure.savefig(path(results.study.name), transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    for name in SHOWN:
        results = Results(STUDIES[name])
        if found := comparisons(results):
            draw(results, found)


if __name__ == "__main__":
    main()
