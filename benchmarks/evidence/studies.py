"""The studies: which runs answer which question. The papers' claims are quoted in docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.evidence.study import Study, Table
from benchmarks.evidence.tasks import Digits, Text
from benchmarks.evidence.training import Run

Block = dict[str, Any]


def mixing(kind: str, **params: Any) -> Block:
    return {"mixing": {"type": kind, "params": params}}


def extrapolated(kind: str, **params: Any) -> Block:
    return {"extrapolation": {"type": kind, "params": params}}


MEAN: Block = mixing("Mean")
GUARD = mixing("Guard")
VRGD: Block = {"scaling": {"type": "VRGD", "params": {}}}
SMOOTH_VRGD: Block = {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}}

# --- text ---

STEPS, BEGIN = 60, 16
TEXT_RATES, TEXT_RATE = (0.006, 0.012, 0.024), 0.012
GUESSING = 6.24  # the natural logarithm of 512: what a run counts that guesses, or does worse


def text(block: Block, task: Text, faults: tuple[str, ...] = ()) -> Run:
    return Run(task, block, "AdamW", STEPS, faults, clipping=1.0, warmup_steps=6, evaluations=4)


def fault(kind: str, worker: int = 0, begin: int = BEGIN, more: str = "") -> str:
    return f"{kind}:rank={worker}:from={begin}{more}"


NOISE = ":scale=100"
NOW_AND_THEN = tuple(fault("noise", begin=at, more=f":until={at}{NOISE}") for at in range(BEGIN, STEPS, 5))
BAD: Mapping[str, tuple[str, ...]] = {
    "nobody bad": (),
    "noise of 100 times the norm": (fault("noise", more=NOISE),),
    "negative gradient": (fault("negative"),),
    "stuck gradient": (fault("stuck"),),
    "scaled by 1000": (fault("scale"),),
    "stale by a step": (fault("stale"),),
    "shuffled tokens": (fault("shuffled"),),
    "NaN": (fault("nan"),),
    "one file only": (),
    "noise in one step of five": NOW_AND_THEN,
    "negative from the start": (fault("negative", begin=1),),
    "two negative": (fault("negative"), fault("negative", worker=1)),
}


HEADLINES = (
    "nobody bad",
    "noise of 100 times the norm",
    "negative gradient",
    "stuck gradient",
    "shuffled tokens",
)


def robust_rules(workers: int, bad: int) -> dict[str, Block]:
    """The rules that are to keep bad workers out, the mean first."""
    rules = {
        "Mean": MEAN,
        "GAF": mixing("GAF"),
        "Guard": GUARD,
        "GeometricMedian": mixing("GeometricMedian"),
        "NormClip": mixing("NormClip"),
    }
    if workers >= bad + 3:
        rules["MultiKrum"] = mixing("MultiKrum", num_byzantine=bad, num_selected=workers - bad)
    return rules


def bad_workers(workers: int) -> Table:
    """Each setting with each rule. Where there are NaNs all but the mean leave a worker with some out, and
    so does "Mean, drop".
    """
    table = Table()
    for setting, faults in BAD.items():
        task = Text(workers, one_file=0 if setting == "one file only" else None)
        rules = robust_rules(workers, 2 if setting == "two negative" else 1)
        if setting == "NaN":
            drop = {name: {**block, "nonfinite": "drop"} for name, block in rules.items()}
            rules = {"Mean": MEAN, "Mean, drop": drop.pop("Mean"), **drop}
        runs = {name: text(block, task, faults) for name, block in rules.items()}
        table.compare(setting, runs, TEXT_RATES, TEXT_RATE)
    return table


def by_deepspeed() -> Table:
    """The headline once more by the `deepspeed` command, bf16."""
    table = Table()
    for setting in HEADLINES:
        runs = {
            name: replace(text(block, Text(4), BAD[setting]), by_deepspeed=True)
            for name, block in (("Mean", MEAN), ("Guard", GUARD))
        }
        table.compare(setting, runs, (TEXT_RATE,), TEXT_RATE)
    return table


def smallest_fault() -> Table:
    table = Table()
    for kind, scales in (("noise", (0.3, 1, 3, 10)), ("scale", (1.5, 2, 4, 10))):
        for scale in scales:
            faults = (fault(kind, more=f":scale={scale:g}"),)
            runs = {name: text(block, Text(8), faults) for name, block in (("Mean", MEAN), ("Guard", GUARD))}
            table.compare(f"{kind} of {scale:g} times the norm", runs, TEXT_RATES, TEXT_RATE)
    return table


def kinds_of_text() -> Table:
    """Honest workers that read text of different kinds."""
    table = Table()
    rules = {
        "Mean": MEAN,
        "Guard": GUARD,
        "Guard, agreement -0.5": mixing("Guard", agreement=-0.5),
        "Guard, agreement -0.5, smoothing 0.98": mixing("Guard", agreement=-0.5, smoothing=0.98),
    }
    rules |= {"GAF": mixing("GAF"), "GeometricMedian": mixing("GeometricMedian")}
    four = ("python", "c++", "prose", "cipher")
    settings = {
        "2 workers for each of 4 kinds": tuple(kind for kind in four for _ in range(2)),
        "7 Python, 1 prose": ("python",) * 7 + ("prose",),
        "7 Python, 1 cipher": ("python",) * 7 + ("cipher",),
    }
    for setting, kinds in settings.items():
        runs = {name: text(block, Text(8, kinds)) for name, block in rules.items()}
        table.compare(setting, runs, TEXT_RATES, TEXT_RATE)
    first, kinds = next(iter(settings.items()))
    negative = BAD["negative gradient"]
    runs = {name: text(block, Text(8, kinds), negative) for name, block in rules.items() if name != "GAF"}
    table.compare(f"{first}, one of wrong sign", runs, TEXT_RATES, TEXT_RATE)
    return table


def clean_text() -> Table:
    """The papers' rules where nothing is wrong."""
    table = Table()
    rules = {
        "Mean": MEAN,
        "GAF 0.97": mixing("GAF", threshold=0.97),
        "GradientMix": mixing("GradientMix"),
        "VRGD": VRGD,
        "VRGD, momentum 0.9": SMOOTH_VRGD,
        "PastGradient, lr_ratio 1": extrapolated("PastGradient", lr_ratio=1.0),
        "PastGradient, layer-wise 0.02": extrapolated("PastGradient", lr=0.02, layerwise=True),
        "Noise": extrapolated("Noise", std=0.001),
    }
    table.compare(
        "8 workers", {name: text(block, Text(8)) for name, block in rules.items()}, TEXT_RATES, TEXT_RATE
    )
    return table


# --- digits ---

DIGIT_RATES: Mapping[str, tuple[float, ...]] = {
    "SGD": (0.01, 0.03, 0.1, 0.3),
    "Adam": (0.003, 0.01, 0.03, 0.1),
    "LAMB": (0.01, 0.03, 0.1, 0.3),
    "LARS": (1.0, 3.0, 10.0, 30.0),
}
FIXED_RATE = {"SGD": 0.1, "Adam": 0.01, "LAMB": 0.03, "LARS": 3.0}


GAF_STEPS, GAF_RATES = 2000, (0.003, 0.01, 0.03, 0.1)
# As published, and one at which all labels are learned by heart.
GAF_RATE = {"SGD": 0.01, "SGD without decay": 0.03}


def gaf_digits() -> Table:
    """As published: few micro-batches that are balanced by class. Without weight decay, which is not as
    published, the perceptron comes to learn wrong labels by heart.
    """
    table = Table()
    published = [(2, "true", noise, "SGD") for noise in (0.6, 0.4, 0.2, 0.0)]
    published += [(2, "noisy", 0.6, "SGD"), (2, "none", 0.6, "SGD"), (4, "true", 0.6, "SGD")]
    others = [(2, balance, 0.6, "SGD without decay") for balance in ("true", "noisy", "none")]
    for workers, balance, noise, optimizer in published + others:
        balanced = "not balanced" if balance == "none" else f"balanced by {balance} label"
        setting = f"{workers} workers, {balanced}, {noise:.0%} noise"
        setting += ", no decay" if optimizer != "SGD" else ""
        task = Digits(workers, 20, noise, balance, hidden=256)
        mean = Run(task, mixing("GAF", threshold=2.0), optimizer, GAF_STEPS)
        thresholds = (0.97, 1.0) if (workers, balance, noise) == (2, "true", 0.6) else (0.97,)
        rules = {f"GAF {t:g}": replace(mean, block=mixing("GAF", threshold=t)) for t in thresholds}
        table.compare(setting, {"threshold 2": mean, **rules}, GAF_RATES, GAF_RATE[optimizer])
        table.control(setting, "GAF 0.97", mean)
    return table


def large_batches(rules: Mapping[str, Block], optimizers: tuple[str, ...], steps: int = 20) -> Table:
    """From small batches to all data, with few epochs, where large ones are said to lose."""
    table = Table()
    for optimizer in optimizers:
        for batch, num_steps in ((64, steps * 5), (256, steps * 2), (1200, steps)):
            size = 0 if batch == 1200 else batch // 8
            setting = f"{optimizer}, batch {batch}, {num_steps} steps"
            run = Run(Digits(8, size, 0.2), MEAN, optimizer, num_steps)
            runs = {name: replace(run, block=block) for name, block in rules.items()}
            table.compare(setting, runs, DIGIT_RATES[optimizer], FIXED_RATE[optimizer])
    return table


ALL_OPTIMIZERS = ("SGD", "Adam", "LAMB", "LARS")
TEXT = "Validation loss in nats"
ERROR = "Test error in per cent"


def _study(name: str, title: str, table: Table, **more: Any) -> Study:
    is_text = any(isinstance(arm.run.task, Text) for arm in table.arms.values())
    kind: dict[str, Any] = (
        {"unit": TEXT, "worst": GUESSING, "matters": 0.02, "num_tuning": 4}
        if is_text
        else {"unit": ERROR, "worst": 90.0, "matters": 0.5}
    )
    return Study(name=name, title=title, arms=table.arms, cells=table.cells, **{**kind, **more})


MANY: Mapping[str, int] = {"seeds": 30, "num_tuning": 6}  # runs of a fraction of a second


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        _study(
            "gaf",
            "GAF: few micro-batches, noisy labels",
            gaf_digits(),
            also="best",
            num_tuning=3,
            tells_learned=True,
        ),
        _study(
            "vrgd",
            "VRGD: from small batches to all data",
            large_batches({"Mean": MEAN, "VRGD": VRGD, "VRGD, momentum 0.9": SMOOTH_VRGD}, ALL_OPTIMIZERS),
            **MANY,
        ),
        _study(
            "extrapolation",
            "Extrapolation: large batches, early progress",
            large_batches(
                {
                    "Mean": MEAN,
                    "PastGradient, lr_ratio 1": extrapolated("PastGradient", lr_ratio=1.0),
                    "PastGradient, layer-wise 0.02": extrapolated("PastGradient", lr=0.02, layerwise=True),
                    "PastGradient, layer-wise 0.1": extrapolated("PastGradient", lr=0.1, layerwise=True),
                    "Noise": extrapolated("Noise", std=0.01),
                },
                ("SGD", "Adam"),
            ),
            also="early",
            **MANY,
        ),
        _study(
            "gradientmix",
            "GradientMix: large batches",
            large_batches({"Mean": MEAN, "GradientMix": mixing("GradientMix")}, ("SGD", "Adam", "LAMB")),
            **MANY,
        ),
        _study("bad_workers", "A bad worker of 8", bad_workers(8)),
        _study(
            "deepspeed",
            "The headline by the deepspeed command",
            by_deepspeed(),
            seeds=3,
            in_an_hour=False,
        ),
        _study("clean_text", "The papers' rules on clean text", clean_text()),
        _study("kinds", "Honest workers with text of different kinds", kinds_of_text()),
        _study("smallest_fault", "The smallest fault that Guard catches", smallest_fault()),
        _study("bad_workers_4", "A bad worker of 4", bad_workers(4), in_an_hour=False),
        _study("bad_workers_16", "A bad worker of 16", bad_workers(16), in_an_hour=False),
    )
}
