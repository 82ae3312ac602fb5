"""`metrics.jsonl`, a line a step, and `summary.png` made from it."""

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def finite(value: Any) -> Any:
    """`value`, or None where JSON has no number for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a file; one cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class MetricsFile:
    """Appends to `metrics.jsonl`, after dropping the lines past `last_step`, which will be trained again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, line: Line) -> None:
        self._file.write(
            json.dumps({key: finite(value) for key, value in line.items()}, allow_nan=False) + "\n"
        )
        self._file.flush()

    def sync(self) -> None:
        """To the disk: a checkpoint must not outlive the lines of its steps."""
        os.fsync(self._file.fileno())


def validation_losses(lines: list[Line]) -> list[tuple[int, float]]:
    return [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]


def report(lines: list[Line]) -> str:
    """First and last validation loss, and how many steps were skipped, in two lines."""
    validations = validation_losses(lines)
    num_skipped = sum(line["skipped"] for line in lines)
    text = f"{len(lines)} steps, {num_skipped} skipped"
    if validations:
        (first_step, first), (last_step, last) = validations[0], validations[-1]
        text += (
            f"\nvalidation loss: first {first:.4f} (step {first_step}), last {last:.4f} (step {last_step})"
        )
    return text


def in_unit_range(values: list[float | None]) -> bool:
    return any(value is not None for value in values) and all(
        value is None or -1 <= value <= 1 for value in values
    )


def draw_summary(lines: list[Line], path: Path) -> None:
    """Losses above; below, what the rules decided, as far as it lies in [-1, 1], and the skipped steps."""
    import matplotlib  # only rank 0 draws, once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, agreement) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    steps = [line["step"] for line in lines]
    losses.plot(
        steps, [as_number(line["loss"]) for line in lines], color="C0", alpha=0.45, lw=0.9, label="training"
    )
    validations = validation_losses(lines)
    losses.plot(*zip(*validations, strict=True), "o-", color="C1", ms=5, lw=1.6, label="validation")
    losses.annotate(
        f"{validations[-1][1]:.3f}", validations[-1], (0, 9), textcoords="offset points", ha="center"
    )
    losses.set_ylabel("loss (nats per token)")

    known = ("step", "loss", "lr", "grad_norm", "skipped", "val_loss")
    for name in dict.fromkeys(key for line in lines for key in line if key not in known):
        values = [line.get(name) for line in lines]
        if in_unit_range(values):
            agreement.plot(
                steps, [as_number(value) for value in values], lw=1.1, label=name.replace("_", " ")
            )
    skipped = [line["step"] for line in lines if line["skipped"]]
    if skipped:
        agreement.plot(skipped, [0.0] * len(skipped), "|", color="C3", ms=12, label="skipped step")
    if not agreement.lines:
        agreement.text(0.5, 0.5, "plain averaging", transform=agreement.transAxes, ha="center", color="gray")
    agreement.set_ylabel("agreement")
    agreement.set_xlabel("step")
    for axes in (losses, agreement):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)
    pyplot.close(figure)


def as_number(value: float | None) -> float:
    return math.nan if value is None else value
