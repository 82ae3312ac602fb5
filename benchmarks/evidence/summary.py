"""What a study found, as numbers and as a table of docs/evidence.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.evidence.results import Results, Trial
from benchmarks.evidence.statistics import Effect, holm, paired, pooled_deviation, power
from benchmarks.evidence.study import FIRST_TUNING_SEED, Cell, Study


class Comparison(NamedTuple):
    """A cell at tuned or at fixed learning rates."""

    cell: Cell
    tuned: bool
    effect: Effect
    also: Effect | None  # of another evaluation, as the study says
    level: float  # the baseline's mean measure
    diverged: tuple[int, int]  # runs that ended in NaN: treated, baseline
    holm_p: float = float("nan")
    repeats: bool = False  # the tuned rates are the fixed one, so these are the same runs


def comparisons(results: Results) -> list[Comparison]:
    """All cells that have results, with p-values corrected over all of these. Where the tuned rates are the
    fixed one, these runs are the same, and count once.
    """
    found, p_values = [], {}
    for cell in results.study.cells:
        rates_before = None
        for tuned in (True, False):
            rates, comparison = _rates(results, cell, tuned), _compare(results, cell, tuned)
            if comparison is not None and rates != rates_before:
                found.append(comparison)
                p_values[len(found) - 1] = comparison.effect.p
            elif comparison is not None:
                found.append(comparison._replace(repeats=True))
            rates_before = rates
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        comparison._replace(holm_p=corrected[i - comparison.repeats]) for i, comparison in enumerate(found)
    ]


def _rates(results: Results, cell: Cell, tuned: bool) -> tuple[float | None, ...]:
    """The learning rates of the arm and its baseline; None where they are not tuned yet."""
    arms = [results.study.arms[name] for name in (cell.treated, cell.baseline)]
    return tuple(results.tuned_rate(arm) if tuned else arm.fixed_rate for arm in arms)


def _compare(results: Results, cell: Cell, tuned: bool) -> Comparison | None:
    pairs = list(_pairs(results, cell, tuned))
    if len(pairs) < 2:
        return None

    treated, baseline = zip(*pairs, strict=True)

    def effect(at: str) -> Effect:
        return paired(*([results.measure(trial, at) for trial in side] for side in (treated, baseline)))

    level = sum(map(results.measure, baseline)) / len(baseline)
    also = None if results.study.also is None else effect(results.study.also)
    diverged = sum(map(results.diverged, treated)), sum(map(results.diverged, baseline))
    return Comparison(cell, tuned, effect("last"), also, level, diverged)


def _pairs(results: Results, cell: Cell, tuned: bool) -> Iterator[tuple[Trial, Trial]]:
    """Runs from the same seed, of those that were not tuned with."""
    rates = _rates(results, cell, tuned)
    if None in rates:
        return
    seeds = sorted({trial.seed for trial in results.lines if trial.seed < FIRST_TUNING_SEED})
    for seed in seeds:
        pair = Trial(cell.treated, rates[0], seed), Trial(cell.baseline, rates[1], seed)
        if all(trial in results.lines for trial in pair):
            yield pair


def expected_power(results: Results, pairs: int) -> tuple[float, float]:
    """From the tuning seeds alone: the standard deviation of paired differences at the fixed rate, pooled
    over cells, and the power to find an effect that matters with so many pairs.
    """
    deviation = pooled_deviation([list(_differences(results, cell)) for cell in results.study.cells])
    return deviation, power(results.study.matters, deviation, pairs)


def _differences(results: Results, cell: Cell) -> Iterator[float]:
    """Treated minus baseline at the fixed rate, with the tuning seeds; not of runs that ended in NaN."""
    arms = [results.study.arms[name] for name in (cell.treated, cell.baseline)]
    for seed in results.study.tuning_seeds:
        trials = [Trial(arm.name, arm.fixed_rate, seed) for arm in arms]
        if all(trial in results.lines and not results.diverged(trial) for trial in trials):
            treated, baseline = map(results.measure, trials)
            yield treated - baseline


def markdown(study: Study) -> str:
    """The study's table."""
    results = Results(study)
    found = {(comparison.cell, comparison.tuned): comparison for comparison in comparisons(results)}
    if not found:
        return f"Not measured yet: `make evidence STUDY={study.name}`.\n"
    is_tuned = any(len(arm.rates) > 1 for arm in study.arms.values())  # else both columns are the same
    head = ["setting", "rule", "baseline's level", *(["tuned rates"] * is_tuned), "fixed rate"]
    head += [f"{study.also}, tuned", f"{study.also}, fixed"] if study.also else []
    lines = [head, ["---"] * len(head)]
    before = ""
    for cell in study.cells:
        tuned, fixed = found.get((cell, True)), found.get((cell, False))
        if tuned is None and fixed is None:
            continue
        setting, before = ("" if cell.setting == before else cell.setting), cell.setting
        level = f"{(tuned or fixed).level:.3g}"  # type: ignore[union-attr]
        line = [setting, cell.rule, level, _cell(tuned), *[_cell(fixed)] * is_tuned]
        if study.also:
            line += [_number(c.also) if c and c.also else "" for c in (tuned, fixed)]
        lines.append(line)
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"{table}\n{_below(results, [c.effect.pairs for c in found.values()])}\n"


def _cell(comparison: Comparison | None) -> str:
    if comparison is None or comparison.repeats:
        return "" if comparison is None else "the same"
    text, (treated, baseline) = _number(comparison.effect), comparison.diverged
    text = f"**{text}**" if comparison.holm_p < 0.05 else text
    ended = f"; NaN {treated}, baseline {baseline}" if treated or baseline else ""
    return f"{text} (p {_probability(comparison.holm_p)}{ended})"


def _number(effect: Effect) -> str:
    digits: Callable[[float], str] = "{:.2f}".format if abs(effect.mean) >= 1 else "{:.3f}".format
    sign = "+" if effect.mean >= 0 else "−"
    return f"{sign}{digits(abs(effect.mean))} ± {digits(effect.half_width)}"


def _probability(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _below(results: Results, pairs: Sequence[int]) -> str:
    study = results.study
    seeds = f"{min(pairs)}" if min(pairs) == max(pairs) else f"{min(pairs)} to {max(pairs)}"
    text = (
        f"{study.unit}, rule minus baseline, ± half of the 95 % interval; {seeds} seeds; p with Holm's "
        "correction over this table, bold below .05."
    )
    deviation, chance = expected_power(results, min(pairs))
    if not math.isnan(deviation):
        text += (
            f" Expected from the tuning seeds, whose paired standard deviation was {deviation:.2g}: an "
            f"effect of {study.matters:g} is found with a chance of {100 * chance:.0f} %."
        )
    if study.tells_learned and (shares := _learned_by_baselines(results)):
        least, most = round(100 * min(shares)), round(100 * max(shares))
        text += f" At the fixed rate the baselines give back {least} to {most} % of the labels they learned."
    return textwrap.fill(text, 110)


def _learned_by_baselines(results: Results) -> list[float]:
    """For each setting's baseline, the mean over seeds at the fixed rate."""
    shares = []
    for name in dict.fromkeys(cell.baseline for cell in results.study.cells):
        arm = results.study.arms[name]
        found = [
            line["learned"]
            for trial, line in results.lines.items()
            if (trial.arm, trial.lr) == (name, arm.fixed_rate) and trial.seed < FIRST_TUNING_SEED
        ]
        if arm.skips_as is None and found:
            shares.append(math.fsum(found) / len(found))
    return shares
