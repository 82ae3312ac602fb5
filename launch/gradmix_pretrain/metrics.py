"""`metrics.jsonl`, one line for each step, and `summary.png` and `report.html`, which are drawn from it."""

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def finite(value: Any) -> Any:
    """The value, or None for an infinity or NaN, which JSON has no numbers for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, without a last line that a killed run did not finish."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class MetricsFile:
    """Appends to `metrics.jsonl`; first removes the lines after `last_step`, which will be trained again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, line: Line) -> None:
        """Append the metrics of a step."""
        self._file.write(
            json.dumps({key: finite(value) for key, value in line.items()}, allow_nan=False) + "\n"
        )
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to the disk, before the checkpoint of their steps is saved."""
        os.fsync(self._file.fileno())


def write_report(run: Path) -> str:
    """Write `report.html` of what the run recorded; returns a line that says where it is, or why not."""
    try:
        from ds_gradmix.report.command import ReportError, write
    except ImportError:  # plain DeepSpeed
        return "no report.html: pip install ds_gradmix[report]"
    try:
        return write([run], run / "report.html")
    except ReportError as error:
        return f"no report.html: {error}"


def validation_losses(lines: list[Line]) -> list[tuple[int, float]]:
    """The steps with a validation, and its losses."""
    return [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]


def report(lines: list[Line]) -> str:
    """The number of steps and of skipped steps, and the first and last validation loss, in two lines."""
    validations = validation_losses(lines)
    num_skipped = sum(line["skipped"] for line in lines)
    text = f"{len(lines)} steps, {num_skipped} skipped"
    if validations:
        (first_step, first), (last_step, last) = validations[0], validations[-1]
        text += (
            f"\nvalidation loss: first {first:.4f} (step {first_step}), last {last:.4f} (step {last_step})"
        )
    return text


def draw_summary(lines: list[Line], path: Path) -> None:
    """Plot the losses, and below them the rules' statistics that lie in [-1, 1] and the skipped steps."""
    import matplotlib  # only rank 0 draws, once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, agreement) = pyplot.subplots(
        2, 1, figsize=(10, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    draw_losses(losses, lines)
    draw_agreement(agreement, lines)
    agreement.set_xlabel("step")
    for axes in (losses, agreement):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)
    pyplot.close(figure)


def draw_losses(axes: Any, lines: list[Line]) -> None:
    """Plot the training and validation loss."""
    draw_with_mean(axes, lines, "loss", color="C0", label="training")
    validations = validation_losses(lines)
    if validations:
        axes.plot(*zip(*validations, strict=True), "o-", color="C1", ms=5, lw=1.6, label="validation")
        value = f"{validations[-1][1]:.3f}"
        axes.annotate(value, validations[-1], (0, 9), textcoords="offset points", ha="center")
    axes.set_ylabel("loss (nats per token)")


def draw_agreement(axes: Any, lines: list[Line]) -> None:
    """Plot the statistics of the rules, and mark the skipped steps."""
    for number, name in enumerate(decisions(lines)):
        draw_with_mean(axes, lines, name, color=f"C{number}", label=name.replace("_", " "))
    skipped = [line["step"] for line in lines if line["skipped"]]
    if skipped:
        axes.plot(skipped, [0.0] * len(skipped), "x", color="black", ms=6, label="skipped step")
    if not axes.lines:
        axes.text(0.5, 0.5, "plain averaging", transform=axes.transAxes, ha="center", color="gray")
    axes.set_ylabel("agreement")


def decisions(lines: list[Line]) -> list[str]:
    """The names of the rules' statistics whose values lie in [-1, 1] and are not all 0."""
    ours = ("step", "loss", "lr", "grad_norm", "skipped", "val_loss")
    names = dict.fromkeys(name for line in lines for name in line if name not in ours)
    known = {name: [line[name] for line in lines if line.get(name) is not None] for name in names}
    return [
        name for name, values in known.items() if any(values) and all(-1 <= value <= 1 for value in values)
    ]


def draw_with_mean(axes: Any, lines: list[Line], name: str, color: str, label: str) -> None:
    """Plot a metric as a thin line, and its mean over the last twentieth of all steps as a thick one."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = [step for step, _ in known], [value for _, value in known]
    width = max(1, len(lines) // 20)
    means = [sum(values[max(0, i - width) : i]) / min(i, width) for i in range(1, len(values) + 1)]
    axes.plot(steps, values, color=color, alpha=0.3, lw=0.7)
    axes.plot(steps, means, color=color, lw=1.4, label=label)
