"""What a study is: arms, each a training run with a rule, and cells, which compare two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from benchmarks.evidence.training import Run

FIRST_TUNING_SEED = 1001  # those from here on are never compared


@dataclass(frozen=True)
class Arm:
    """A run, but for its seed, and the learning rates that are tried.

    Attributes:
        name: unique in its study.
        rates: tried with the tuning seeds, unless it is a single one; as many for both arms of a cell.
        fixed_rate: at which all arms of a setting are trained besides.
        skips_as: the name of another arm. This one skips as many steps as that, at random, at the learning
            rates and seeds of that, and is not tuned.
    """

    name: str
    run: Run
    rates: tuple[float, ...]
    fixed_rate: float
    skips_as: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of what its runs depend on; results with another one are of an arm that has changed."""
        depends = json.dumps([type(self.run.task).__name__, asdict(self.run), self.skips_as], sort_keys=True)
        return hashlib.sha256(depends.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Cell:
    """A row of the table: an arm against its baseline, in a setting said in words."""

    setting: str
    rule: str
    treated: str
    baseline: str


@dataclass(frozen=True)
class Study:
    """Cells that are about one question; Holm's correction is over all of them.

    Attributes:
        name: of the file of results, and for STUDY=.
        title: in docs/evidence.md.
        unit: of the measure, of which less is better.
        worst: what a run counts that ends in NaN, or with more than this.
        matters: an effect that a user would care for; the power is estimated for it.
        also: "best", if the best evaluation of a run is compared besides the last one, or "early", if the one
            after a fifth of the steps is.
        seeds: how many pairs, unless a number is asked for.
        num_tuning: how many seeds learning rates are tried with.
        tells_learned: whether the table says how much of the training labels was learned by heart.
        in_an_hour: whether `make evidence` trains it without being asked by name.
    """

    name: str
    title: str
    unit: str
    worst: float
    matters: float
    arms: Mapping[str, Arm]
    cells: Sequence[Cell]
    also: str | None = None
    seeds: int = 10
    num_tuning: int = 2
    tells_learned: bool = False
    in_an_hour: bool = True

    @property
    def tuning_seeds(self) -> range:
        """Those that learning rates are tried with."""
        return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.num_tuning)


@dataclass
class Table:
    """Collects the arms and cells of a study."""

    arms: dict[str, Arm] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def compare(
        self, setting: str, rules: Mapping[str, Run], rates: tuple[float, ...], fixed_rate: float
    ) -> None:
        """A setting's arms by the name of the rule; the first is the baseline of the others."""
        names = {rule: f"{setting}: {rule}" for rule in rules}
        for rule, run in rules.items():
            self.arms[names[rule]] = Arm(names[rule], run, rates, fixed_rate)
        baseline, *others = rules
        self.cells += [Cell(setting, rule, names[rule], names[baseline]) for rule in others]

    def control(self, setting: str, rule: str, run: Run) -> None:
        """One more arm: `run`, which skips as many steps as `rule` does; compared with what `rule` gives."""
        like = self.arms[f"{setting}: {rule}"]
        name = f"{setting}: random skips as {rule}"
        self.arms[name] = Arm(name, run, like.rates, like.fixed_rate, skips_as=like.name)
        self.cells.append(Cell(setting, f"{rule}, against as many random skips", like.name, name))
