"""The bench of benchmarks/evidence: its training against a loop in float64, its statistics, its results."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from multiprocessing.dummy import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradmix_pretrain.tokens import Tokens
from scipy import stats
from torch.func import functional_call

from benchmarks.evidence import runner, tasks, training
from benchmarks.evidence.results import Results, Trial
from benchmarks.evidence.statistics import holm, paired, pooled_deviation, power
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.study import Arm, Cell, Study, Table
from benchmarks.evidence.summary import comparisons, markdown
from benchmarks.evidence.tasks import Digits, Text
from benchmarks.evidence.training import Run, train
from ds_gradmix.config import parse_block
from tests.support.reference import guard_decision, guard_observation, vrgd


def _replay(run: Run, lr: float, seed: int, steps: int) -> torch.Tensor:
    """SGD with Nesterov's momentum by hand, every worker's gradient by itself, rules by the reference."""
    problem = run.task.problem(seed, ())
    weights = [p.detach().double() for p in problem.module.parameters()]
    names = [name for name, _ in problem.module.named_parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    scores, count, smooth = np.zeros(run.task.workers), 0, np.zeros(0)
    everyone = np.ones(run.task.workers, dtype=bool)
    for step in range(steps):
        rows = []
        for x, y in zip(*problem.batch(step), strict=True):
            leaves = [w.clone().requires_grad_() for w in weights]
            logits = functional_call(problem.module, dict(zip(names, leaves, strict=True)), (x.double(),))
            loss = torch.nn.functional.cross_entropy(logits, y)
            rows.append(np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(loss, leaves)]))
        if run.faults and step >= 5:
            rows[1] = -rows[1]
        sizes = [w.numel() for w in weights]
        if "mixing" in run.block:
            stacked = np.stack(rows)
            norms = [float(np.linalg.norm(row)) for row in rows]
            mean = guard_decision(norms, everyone, scores, count, {}) @ stacked
            scores, count = guard_observation(stacked @ stacked.T, scores, count, 0.9)
        else:
            mean, factors = vrgd(rows, np.full(len(rows), 1 / len(rows)), sizes, 0.1)
            smooth = 0.9 * (smooth if len(smooth) else 0 * factors) + 0.1 * factors
            mean = mean * smooth / (1 - 0.9 ** (step + 1))
        for w, v, part in zip(weights, velocity, np.split(mean, np.cumsum(sizes)[:-1]), strict=True):
            g = torch.from_numpy(part).view_as(w) + 0.01 * w
            v.mul_(0.9).add_(g)
            w.sub_(lr * (g + 0.9 * v))
    return torch.cat([w.flatten() for w in weights])


@pytest.mark.parametrize(
    "run",
    [
        Run(Digits(5, 8), {"mixing": {"type": "Guard"}}, faults=("negative:rank=1:from=6",), steps=25),
        Run(Digits(5, 8), {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}}, steps=25),
    ],
    ids=["Guard with a negative worker", "VRGD with momentum"],
)
def test_training_equals_a_loop_in_float64(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = training._Training(run, 0.05, 3, 0.0)
    trained.run()
    expected = _replay(run, 0.05, 3, run.steps)
    assert torch.allclose(trained.theta.values_N.double(), expected, atol=2e-5)
    assert (trained.theta.values_N - training.Weights(run.task.problem(3, ()).module).values_N).norm() > 1


def test_a_worker_looks_from_its_own_point() -> None:
    """The gradients of the second step are those at theta moved back by each worker's own last gradient."""
    block = {"extrapolation": {"type": "PastGradient", "params": {"lr": 0.5}}}
    trained = training._Training(Run(Digits(3, 10), block), 0.1, 0, 0.0)
    trained._step(0, left_out=False)
    theta_N, past_WN = trained.theta.values_N.clone(), trained.past_WN
    problem = Digits(3, 10).problem(0, ())
    problem.batch(0)
    x, y = problem.batch(1)
    found_WN = trained._gradients(1, 0.1)
    for worker in range(3):
        at = (theta_N - 0.5 * past_WN[worker]).requires_grad_()
        logits = functional_call(problem.module, trained.theta.views(at), (x[worker],))
        loss = torch.nn.functional.cross_entropy(logits, y[worker])
        assert torch.allclose(torch.autograd.grad(loss, at)[0], found_WN[worker], atol=1e-6)
    assert not torch.allclose(*found_WN[:2])


def test_skipping_and_nan() -> None:
    run = Run(Digits(2, 10), steps=200, evaluations=2)
    assert 60 < train(run, 0.01, 0, skip_share=0.5)["skipped"] < 140
    assert train(run, 0.01, 0)["skipped"] == 0
    broken = train(replace(run, faults=("nan:rank=0:from=50",)), 0.01, 0)
    assert broken["curve"] == [None, None]
    dropped = train(replace(run, faults=("nan:rank=0:from=50",), block={"nonfinite": "drop"}), 0.01, 0)
    assert dropped["curve"][-1] < 15 and dropped["weights"][0] < 0.2


def test_digits() -> None:
    problem = Digits(4, 20, label_noise=0.5, balance="true").problem(1, ())
    x, y = problem.batch(0)
    assert x.shape == (4, 20, 64) and y.shape == (4, 20)
    share = float((problem.y != problem.true_y).double().mean())
    assert 0.45 < share < 0.55
    by_pixels = {
        row.numpy().tobytes(): int(label) for row, label in zip(problem.x, problem.true_y, strict=True)
    }
    true = [[by_pixels[row.numpy().tobytes()] for row in worker] for worker in x]
    assert all(sorted(labels) == sorted(list(range(10)) * 2) for labels in true)
    _, noisy = Digits(4, 20, label_noise=0.5, balance="noisy").problem(1, ()).batch(0)
    assert all(sorted(labels.tolist()) == sorted(list(range(10)) * 2) for labels in noisy)
    everything, _ = Digits(8, 0).problem(1, ()).batch(0)
    assert everything.shape == (8, 150, 64) and len(everything.reshape(1200, 64).unique(dim=0)) > 1190


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a kind share its windows; one with one file reads nothing else; faults hit their worker."""
    begins = {"python": 0, "prose": 250}

    def made(kind: str) -> Tokens:
        tokens = np.arange(64_000) % 200 + begins[kind]
        return Tokens(512, "", tokens, tokens[:8192])

    monkeypatch.setattr(tasks, "tokens", made)
    tasks.validation_windows.cache_clear()
    problem = Text(4, ("python", "python", "prose", "python")).problem(0, ())
    (batch,) = problem.batch(3)
    assert batch.shape == (4, 8, 32)
    assert batch[2].min() >= 250 > 200 > batch[[0, 1, 3]].max()
    again = Text(4, ("python",)).problem(0, training.parsed_faults(("duplicate:rank=1:from=1",), 10, 4))
    (batch,) = again.batch(0)
    assert torch.equal(batch[1], batch[2]) and not torch.equal(batch[1], batch[0])
    only = Text(2, one_file=0).problem(0, ())
    assert len(only.windows[0].tokens_N) == 20_000
    views = {name: p.detach() for name, p in problem.module.named_parameters()}
    assert math.isclose(problem.evaluate(views), math.log(512), abs_tol=0.2)
    tasks.validation_windows.cache_clear()


def test_paired_is_students_test() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=12), random.normal(0.4, size=12)
    expected = stats.ttest_rel(a, b)
    found = paired(list(a), list(b))
    interval = expected.confidence_interval()
    assert math.isclose(found.p, expected.pvalue) and math.isclose(found.mean, np.mean(a - b))
    assert math.isclose(found.mean - found.half_width, interval.low)
    assert paired([1, 2], [1, 2]).p == 1 and paired([2, 3], [1, 2]).p == 0
    with pytest.raises(ValueError, match="at least 2"):
        paired([1.0], [2.0])


def test_holm() -> None:
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_power() -> None:
    """Against simulated experiments, and a value of the books: 10 pairs, an effect of one deviation."""
    assert math.isclose(power(1.0, 1.0, 10), 0.803, abs_tol=0.001)
    samples = np.random.default_rng(0).normal(0.5, 1, (20_000, 12))
    found = (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean()
    assert math.isclose(power(0.5, 1.0, 12), found, abs_tol=0.01)
    assert math.isclose(pooled_deviation([[1, 3], [0, 0, 3], [5]]), math.sqrt((2 + 6) / 3))


def small_study() -> Study:
    table = Table()
    run = Run(Digits(2, 10), steps=4, evaluations=2)
    gaf = replace(run, block={"mixing": {"type": "GAF", "params": {"threshold": 0.2}}})
    table.compare("here", {"Mean": run, "GAF": gaf}, (0.01, 0.1), 0.1)
    table.control("here", "GAF", run)
    return Study("small", "Small", "Error", 90.0, 0.5, table.arms, table.cells)


def test_a_study_is_trained_in_stages_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study()
    monkeypatch.setattr(runner, "Results", lambda study: Results(study, tmp_path))
    monkeypatch.setattr(runner, "STUDIES", {"small": study})
    results = Results(study, tmp_path)
    assert {trial.seed for trial in results.missing(range(3))} == {1001, 1002}
    with Pool(2) as pool:
        assert not runner._complete("small", 3, time.monotonic(), pool)  # no time left
        assert runner._complete("small", 3, time.monotonic() + 60, pool)
    results = Results(study, tmp_path)
    assert not results.missing(range(3)) and results.missing(range(4))
    text = results.path.read_text()
    like, control = (Trial(name, 0.1, 0) for name in ("here: GAF", "here: random skips as GAF"))
    assert results.skip_share(control) == results.lines[like]["skipped"] / 4
    before = len(results.lines)
    with Pool(2) as pool:
        assert runner._complete("small", 3, time.monotonic() + 60, pool)
    assert results.path.read_text() == text and len(Results(study, tmp_path).lines) == before
    changed = replace(study.arms["here: GAF"], run=replace(study.arms["here: GAF"].run, steps=5))
    other = replace(study, arms={**study.arms, "here: GAF": changed})
    assert {trial.arm for trial in Results(other, tmp_path).missing(range(3))} == {"here: GAF"}
    found = comparisons(Results(study, tmp_path))
    assert {(c.cell.rule, c.tuned) for c in found} == {
        (rule, tuned) for rule in ("GAF", "GAF, against as many random skips") for tuned in (True, False)
    }


def test_rates_are_tuned_and_runs_compared_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With results made up: the rate is the best on the tuning seeds alone, and pairs are of equal seeds."""
    run = Run(Digits(2, 10))
    arms = {name: Arm(name, replace(run, steps=i), (1.0, 2.0), 1.0) for i, name in enumerate("ab", 1)}
    study = Study("made", "Made", "Error", 90.0, 0.5, arms, [Cell("here", "b", "b", "a")], also="best")
    results = Results(study, tmp_path)

    def add(arm: str, lr: float, seed: int, *curve: Any) -> None:
        results.add(Trial(arm, lr, seed), {"curve": list(curve), "skipped": 0})

    for arm, best in (("a", 1.0), ("b", 2.0)):
        for lr in (1.0, 2.0):
            for seed in study.tuning_seeds:
                add(arm, lr, seed, 9.0, 3.0 if lr == best else 4.0)
    for seed in range(3):
        add("a", 1.0, seed, 2.0, 5.0 + seed)
        add("b", 1.0, seed, 9.0, None if seed == 2 else 200.0)
        add("b", 2.0, seed, 1.0, 4.0 + seed)
    assert results.tuned_rate(arms["a"]) == 1.0 and results.tuned_rate(arms["b"]) == 2.0
    tuned, fixed = sorted(comparisons(results), key=lambda c: not c.tuned)
    assert (tuned.effect.mean, tuned.effect.half_width, tuned.level) == (-1.0, 0.0, 6.0)
    assert tuned.also is not None and tuned.also.mean == -1.0 and fixed.diverged == (1, 0)
    assert math.isclose(fixed.effect.mean, 90 - 6)
    monkeypatch.setattr("benchmarks.evidence.results.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.evidence.summary.Results", lambda study: results)
    assert "| here | b | 6 | **−1.00 ± 0.00** (p < .001) |" in markdown(study)
    same = Study("same", "Same", "Error", 90.0, 0.5, arms, [Cell("here", "a", "a", "a")])
    again = Results(same, tmp_path)
    again.lines = results.lines
    first, second = comparisons(again)
    assert not first.repeats and second.repeats and first.holm_p == second.holm_p == 1.0
    assert "NaN 1, baseline 0" in markdown(study) and "3 seeds" in markdown(study)


def test_all_studies_make_sense() -> None:
    for name, study in STUDIES.items():
        assert name == study.name
        for arm in study.arms.values():
            parse_block(arm.run.block)
            training.parsed_faults(arm.run.faults, arm.run.steps, arm.run.task.workers)
            assert arm.fixed_rate in arm.rates
        for cell in study.cells:
            treated, baseline = study.arms[cell.treated], study.arms[cell.baseline]
            assert treated.rates == baseline.rates and treated.fixed_rate == baseline.fixed_rate
            assert treated.run.task == baseline.run.task and treated.run.faults == baseline.run.faults
        lines = [json.loads(line) for line in _lines(name)]
        assert {line["arm"] for line in lines} <= study.arms.keys()
        assert all(line["of"] == study.arms[line["arm"]].fingerprint for line in lines), "trained as written"


def _lines(name: str) -> list[str]:
    path = Results(STUDIES[name]).path
    return path.read_text().splitlines() if path.exists() else []
