"""The results of compare.py as a picture, as a table and in words; README.md shows them too."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]  # what compare.json holds

RULES = ("Mean", "Guard")
NOISE_SCALE = 100  # of the fault
_INK = "#1f2328"
# The picture has a background of its own, since it cannot know that of the page that shows it.
_STYLE = """<style>
svg {color: #1f2328} #page path {fill: #ffffff !important}
@media (prefers-color-scheme: dark) {svg {color: #e6edf3} #page path {fill: #0d1117 !important}}
</style>
"""
# Of good workers wide and pale, and dotted upon it, since these two may be the same.
_LINES: Mapping[tuple[str, bool], Mapping[str, Any]] = {
    ("Mean", False): {"color": "#e8710a", "lw": 5, "alpha": 0.5},
    ("Guard", False): {"color": "#2f81f7", "lw": 1.8, "ls": ":"},
    ("Mean", True): {"color": "#e8710a", "lw": 1.8},
    ("Guard", True): {"color": "#2f81f7", "lw": 1.8},
}


def run_of(results: Results, rule: str, faulty: bool) -> Mapping[str, Any]:
    """The run by a rule, with the bad worker or without."""
    (run,) = [run for run in results["runs"] if (run["rule"], run["faulty"]) == (rule, faulty)]
    return run


def rows(results: Results) -> list[Sequence[str]]:
    """The head of a table, and the last validation losses by each rule."""
    table = [["validation loss", f"all {results['workers']} workers good", "one bad worker"]]
    for rule in RULES:
        runs = (run_of(results, rule, faulty) for faulty in (False, True))
        table.append([rule, *(f"{run['val_loss'][-1][1]:.2f}" for run in runs)])
    return table


def aligned(results: Results) -> str:
    """That table, for a terminal."""
    table = rows(results)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def fault(results: Results) -> str:
    """What is wrong with the bad worker."""
    return (
        f"One of {results['workers']} workers breaks after {results['good_steps']} steps: "
        f"its gradients become noise, {NOISE_SCALE} times as long"
    )


def findings(results: Results) -> str:
    """Whom Guard left out and telemetry warned of, first of all beside the bad worker, then in any run."""
    beside, bad = run_of(results, "Guard", True), results["workers"] - 1
    said = [f"Guard first leaves out rank {rank} at step {step}" for rank, step in beside["left_out"]]
    said += [f"telemetry warns of rank {rank} at step {step}" for rank, step in beside["alarms"]]
    wrongly = 0
    for run in results["runs"]:
        named = {rank for rank, _ in run["left_out"] + run["alarms"]}
        wrongly += bool(named - ({bad} if run["faulty"] else set()))
    told = ", ".join(said) or "Nobody is left out or warned of"
    return f"{told}; a good worker is left out or warned of in {wrongly or 'none'} of the four runs."


def conditions(results: Results) -> str:
    """What was trained."""
    config, optimizer = results["config"], results["config"]["optimizer"]
    tokens = config["train_micro_batch_size_per_gpu"] * results["sequence_length"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"One run each, {results['steps']} steps: a Llama of {results['parameters'] / 1e6:.1f} million "
        f"parameters, {tokens} tokens a worker and step, {optimizer['type']} at learning rate "
        f"{optimizer['params']['lr']:g}, not tuned, clipping {config['gradient_clipping']:g}, "
        f"{'bf16' if 'bf16' in config else 'fp32'}, ZeRO-{config['zero_optimization']['stage']}, "
        f"on {results['device']} ({versions})."
    )


def draw(results: Results) -> str:
    """The picture, as SVG: of the same results the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {"svg.hashsalt": "compare", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context({**settings, **dict.fromkeys(colors, _INK)}):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.5), layout="constrained")
        figure.patch.set_gid("page")
        axes.patch.set_visible(False)
        axes.set_title(fault(results), fontsize=10)
        draw_losses(axes, results)
        words = textwrap.fill(f"{findings(results)} {conditions(results)}", 135, break_on_hyphens=False)
        figure.supxlabel(words, fontsize=7.5, x=0.01, ha="left")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return file.getvalue().replace(_INK, "currentColor").replace("<defs>", f"{_STYLE}<defs>", 1)


def draw_losses(axes: Any, results: Results) -> None:
    """Validation loss over steps, without the first step, of four runs."""
    for (rule, faulty), line in _LINES.items():
        points = run_of(results, rule, faulty)["val_loss"][1:]
        label = f"{rule}, {'one bad worker' if faulty else 'all workers good'}"
        axes.plot(*zip(*points, strict=True), label=label, **line)
    axes.axvline(results["good_steps"], color="gray", lw=0.8)
    top = (results["good_steps"], 1)
    beside = {"xycoords": axes.get_xaxis_transform(), "xytext": (5, -2), "textcoords": "offset points"}
    axes.annotate("one worker breaks", top, va="top", **beside)
    axes.set(xlabel="step", ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
