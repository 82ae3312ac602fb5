"""Results as JSON lines, a run each, and what is chosen from them: learning rates, and pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence import RESULTS
from benchmarks.evidence.study import Arm, Study


class Trial(NamedTuple):
    """A run that was trained, or is to be."""

    arm: str
    lr: float
    seed: int


class Results:
    """What is known of a study. Lines of arms that have changed since are left out."""

    def __init__(self, study: Study, folder: Path = RESULTS) -> None:
        self.study = study
        self.path = folder / f"{study.name}.jsonl"
        self.lines: dict[Trial, dict[str, Any]] = {}
        if self.path.exists():
            for text in self.path.read_text().splitlines():
                self._note(json.loads(text))

    def _note(self, line: dict[str, Any]) -> None:
        arm = self.study.arms.get(line["arm"])
        if arm is not None and arm.fingerprint == line["of"]:
            self.lines[Trial(line["arm"], line["lr"], line["seed"])] = line

    def add(self, trial: Trial, found: dict[str, Any]) -> None:
        """Keep a result, also in the file."""
        line = {**trial._asdict(), "of": self.study.arms[trial.arm].fingerprint, **found}
        self._note(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def tidy(self) -> None:
        """Write the file again in order, without lines of arms that have changed."""
        if self.lines:
            lines = [json.dumps(self.lines[trial]) for trial in sorted(self.lines)]
            self.path.write_text("\n".join(lines) + "\n")

    def measure(self, trial: Trial, at: str = "last") -> float:
        """A run's measure: the last one, the best one, or the one after a fifth of the steps ("early");
        `worst` if it ended in NaN before.
        """
        values = [self._finite(value) for value in self.lines[trial]["curve"]]
        if at == "best":
            return min(values)
        return values[-1] if at == "last" else values[max(len(values) // 5, 1) - 1]

    def _finite(self, value: float | None) -> float:
        return self.study.worst if value is None else min(value, self.study.worst)

    def diverged(self, trial: Trial) -> bool:
        return self.lines[trial]["curve"][-1] is None

    def tuned_rate(self, arm: Arm) -> float | None:
        """The learning rate with the best mean over the tuning seeds; None before all were tried."""
        if arm.skips_as is not None:
            return self.tuned_rate(self.study.arms[arm.skips_as])
        if len(arm.rates) == 1:
            return arm.rates[0]
        sums = {}
        for lr in arm.rates:
            trials = [Trial(arm.name, lr, seed) for seed in self.study.tuning_seeds]
            if any(trial not in self.lines for trial in trials):
                return None
            sums[lr] = math.fsum(self.measure(trial) for trial in trials)
        return min(sums, key=lambda lr: sums[lr])

    def missing(self, seeds: Iterable[int]) -> list[Trial]:
        """What is to be trained next: first the tuning, then runs at the tuned and the fixed rate, then
        controls. Empty at the end.
        """
        seeds = list(seeds)
        arms = [arm for arm in self.study.arms.values() if arm.skips_as is None]
        tuned = [arm for arm in arms if len(arm.rates) > 1]
        of_tuning = self.study.tuning_seeds
        tuning = [Trial(arm.name, lr, seed) for arm in tuned for lr in arm.rates for seed in of_tuning]
        compared = [trial for arm in arms for trial in self._compared(arm, seeds)]
        controls = [arm for arm in self.study.arms.values() if arm.skips_as is not None]
        after = [trial for arm in controls for trial in self._compared(arm, seeds)]
        for stage in (tuning, compared, after):
            if left := [trial for trial in dict.fromkeys(stage) if trial not in self.lines]:
                return left
        return []

    def _compared(self, arm: Arm, seeds: Sequence[int]) -> list[Trial]:
        rates = {arm.fixed_rate, self.tuned_rate(arm)} - {None}
        return [Trial(arm.name, lr, seed) for lr in sorted(rates) for seed in seeds]

    def skip_share(self, trial: Trial) -> float:
        """Which share of steps the run of a control leaves out: that of the run it is a control of."""
        arm = self.study.arms[trial.arm]
        if arm.skips_as is None:
            return 0.0
        like = self.lines[Trial(arm.skips_as, trial.lr, trial.seed)]
        return float(like["skipped"]) / arm.run.steps
