"""Numbers of telemetry against their formulas; alarms for each fault, and none without; the settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradmix.config import ConfigError, parse_block
from ds_gradmix.exchange.participation import Participation
from ds_gradmix.rules import MixingDecision
from ds_gradmix.telemetry.alarms import Alarm, Alarms, Place
from ds_gradmix.telemetry.measures import KINDS, Reading, WorkerMeasures, packed_size, unpack
from ds_gradmix.telemetry.noise_scale import DECAY, NoiseScale, estimates
from ds_gradmix.telemetry.numbers import by_worker, finite, flattened, scalars
from ds_gradmix.telemetry.settings import TelemetrySettings
from tests.support.reference import agreements
from tests.support.solo import NoSynchronisation

CPU = torch.device("cpu")
BAD, BEGIN = 1, 60


def gradients(workers: int, steps: int, fault: str | None, seed: int, shared: float = 0.4) -> Any:
    """Gradients `[W, N]` of every step, of lengths that vary; one worker is wrong from step `BEGIN` on."""
    random = torch.Generator().manual_seed(seed)
    stuck, before = None, None
    for step in range(1, steps + 1):
        grads = shared * torch.randn(200, generator=random, dtype=torch.float64)
        grads = grads + torch.randn(workers, 200, generator=random, dtype=torch.float64)
        grads = grads * (0.2 * torch.randn(workers, 1, generator=random, dtype=torch.float64)).exp()
        noise = torch.randn(200, generator=random, dtype=torch.float64)
        if fault is not None and step >= BEGIN:
            stuck = grads[BAD].clone() if stuck is None else stuck
            grads[BAD] = {
                "negative": -grads[BAD],
                "noise": noise,
                "noise100": 100 * noise,
                "scaled": 1000 * grads[BAD],
                "zero": torch.zeros_like(noise),
                "stuck": stuck,
                "duplicate": grads[-2],
                "nan": noise * math.nan,
                "stale": before,
            }[fault]
        before = stuck if before is None else grads[BAD].clone()
        yield step, grads


def alarms_of(workers: int, fault: str | None, seed: int, steps: int = 150, **keys: Any) -> list[Alarm]:
    settings = TelemetrySettings(**keys)
    measures, alarms = WorkerMeasures(workers, settings, CPU), Alarms(settings, workers, scales_loss=False)
    found = []
    for step, grads in gradients(workers, steps, fault, seed):
        measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
        if step % settings.every == 0:
            found += alarms.hear(unpack(measures.packed().tolist(), workers), step)
            measures.begin_period()
    return found


FAULTS = {
    "negative": "pointing away",
    "noise": "never agreeing",
    "noise100": "exploding",
    "scaled": "exploding",
    "zero": "vanishing",
    "stuck": "stuck",
    "nan": "not finite",
}


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_one_worker_is_told_once(fault: str, workers: int) -> None:
    for seed in range(3):
        (alarm,) = alarms_of(workers, fault, seed)
        assert alarm.worker == BAD and alarm.what[0] == FAULTS[fault] and alarm.partner is None
        assert BEGIN <= alarm.since <= BEGIN + 60 and alarm.step < BEGIN + 80
        (later,) = alarms_of(workers, fault, seed, every=10)
        assert later.worker == BAD and later.step % 10 == 0 and later.since == alarm.since


def test_workers_with_the_same_data_are_told_with_each_other() -> None:
    one, other = alarms_of(4, "duplicate", 0)
    assert {one.worker, other.worker} == {1, 2} and {one.partner, other.partner} == {1, 2}
    assert one.what == ("same as another worker's",) and one.since == BEGIN
    places = [Place([i], [f"host{i}"]) for i in range(4)]
    expected = "step 79: rank 1 on host1 looks faulty since about step 60: same as those of rank 2 on host2"
    assert one.sentence(places) == f"{expected} (the same data?)"


@pytest.mark.parametrize("shared", [0.05, 0.2, 0.6])
def test_twenty_runs_without_a_fault_give_no_alarm(shared: float) -> None:
    for seed in range(20):
        settings = TelemetrySettings()
        measures, alarms = WorkerMeasures(4, settings, CPU), Alarms(settings, 4, scales_loss=False)
        for step, grads in gradients(4, 150, None, seed, shared):
            measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
            if step % 10 == 0:
                assert alarms.hear(unpack(measures.packed().tolist(), 4), step) == []
                measures.begin_period()


def test_a_worker_that_recovers_and_fails_again_is_told_again() -> None:
    settings = TelemetrySettings(alarm_steps=4)
    measures, alarms = WorkerMeasures(4, settings, CPU), Alarms(settings, 4, scales_loss=False)
    told = []
    for step, grads in gradients(4, 60, None, 1):
        if 10 <= step < 20 or step >= 40:
            grads[BAD] = 1000 * grads[BAD]
        measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
        told += [alarm.step for alarm in alarms.hear(unpack(measures.packed().tolist(), 4), step)]
    assert len(told) == 2 and 10 < told[0] < 20 and 40 < told[1] < 50


def test_an_overflow_now_and_then_is_no_fault_where_the_loss_is_scaled() -> None:
    settings = TelemetrySettings()
    for scales, expected in ((True, []), (False, [BAD])):
        measures, alarms = WorkerMeasures(4, settings, CPU), Alarms(settings, 4, scales_loss=scales)
        told = []
        for step, grads in gradients(4, 40, None, 1):
            if step in (20, 30):
                grads[BAD] = math.inf
            measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
            told += [alarm.worker for alarm in alarms.hear(unpack(measures.packed().tolist(), 4), step)]
        assert sorted(set(told)) == expected


def test_a_reading_has_the_formulas_means() -> None:
    workers, samples = 5, 16.0
    measures = WorkerMeasures(workers, TelemetrySettings(), CPU)
    rows, trace, square = [], 0.0, 0.0
    for step, grads in gradients(workers, 7, None, 3):
        gram = (grads @ grads.t()).numpy()
        with NoSynchronisation():
            measures.add(grads @ grads.t(), grads.square().sum(1), samples, step)
        mean = grads.mean(0)
        s = samples * float((grads - mean).square().sum()) / (workers - 1)
        g = float(mean.square().sum()) - s / (workers * samples)
        trace, square = 0.95 * trace + 0.05 * s, 0.95 * square + 0.05 * g
        norms = np.sqrt(np.diag(gram))
        pairs = (gram / np.outer(norms, norms))[~np.eye(workers, dtype=bool)]
        rows.append((pairs.mean(), pairs.min(), s, g, norms, agreements(gram)))
    packed = measures.packed()
    assert packed.shape == (packed_size(workers),)
    found = unpack(packed.tolist(), workers)
    assert found.steps == 7 and found.mean_cosine == pytest.approx(np.mean([row[0] for row in rows]))
    assert found.min_cosine == pytest.approx(min(row[1] for row in rows))
    assert found.trace_covariance == pytest.approx(np.mean([row[2] for row in rows]))
    assert found.squared_gradient == pytest.approx(np.mean([row[3] for row in rows]))
    assert found.noise_scale == pytest.approx(trace / square)
    np.testing.assert_allclose(found.norm, np.mean([row[4] for row in rows], axis=0))
    np.testing.assert_allclose(found.agreement, np.mean([row[5] for row in rows], axis=0), atol=1e-7)
    measures.begin_period()
    assert unpack(measures.packed().tolist(), workers).noise_scale == pytest.approx(trace / square)


def test_the_estimates_of_the_noise_scale_have_no_bias() -> None:
    """Of a known gradient and covariance, over many draws."""
    random = torch.Generator().manual_seed(5)
    truth = torch.randn(30, generator=random, dtype=torch.float64) * 0.1
    deviations = torch.rand(30, generator=random, dtype=torch.float64)
    workers, samples, draws = 4, 8, 20_000
    noise = torch.randn(draws, workers, 30, generator=random, dtype=torch.float64) * deviations / samples**0.5
    grads = truth + noise
    found = estimates(grads.square().sum((1, 2)), grads.sum(1).square().sum(1), workers, samples)
    errors = found.std(1) / draws**0.5
    expected = torch.stack([deviations.square().sum(), truth.square().sum()])
    assert ((found.mean(1) - expected).abs() < 4 * errors).all()


def test_running_means_are_corrected_and_leave_out_what_is_not_finite() -> None:
    noise = NoiseScale((2,), CPU)
    assert noise.value.isnan().all()
    values = [(3.0, 1.0), (5.0, 2.0), (math.nan, 1.0), (4.0, 4.0)]
    for trace, square in values:
        noise.add(torch.tensor([[trace, 2.0], [square, -1.0]], dtype=torch.float64))
    weights = [DECAY**k for k in (2, 1, 0)]
    kept = [pair for pair in values if not math.isnan(pair[0])]
    means = [sum(w * pair[i] for w, pair in zip(weights, kept, strict=True)) / sum(weights) for i in (0, 1)]
    assert noise.means[:, 0].tolist() == pytest.approx(means)
    assert float(noise.value[0]) == pytest.approx(means[0] / means[1])
    assert math.isnan(float(noise.value[1]))  # no gradient to be told from noise


def test_the_noise_scale_goes_on_after_a_checkpoint_and_faults_start_afresh() -> None:
    """A worker that was mended before the resume must not end the run once more."""
    settings = TelemetrySettings()
    straight, resumed = (WorkerMeasures(4, settings, CPU) for _ in range(2))
    for step, grads in gradients(4, 110, "negative", 2):
        for measures in (straight, resumed):
            measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
        if step == 100:
            assert unpack(resumed.packed().tolist(), 4).runs["disagreeing"][BAD] > 20
            saved = {name: value.clone() for name, value in resumed.state_dict().items()}
            resumed.load_state_dict(saved)
            assert not any(map(any, unpack(resumed.packed().tolist(), 4).runs.values()))
    one, other = (unpack(measures.packed().tolist(), 4) for measures in (straight, resumed))
    assert one.noise_scale == other.noise_scale and one.runs != other.runs
    resumed.load_state_dict(None)
    assert math.isnan(unpack(resumed.packed().tolist(), 4).noise_scale)


def test_two_workers_have_numbers_but_no_alarms() -> None:
    assert alarms_of(2, None, 0) == []
    measures = WorkerMeasures(2, TelemetrySettings(), CPU)
    for step, grads in gradients(2, 100, "scaled", 0):
        measures.add(grads @ grads.t(), grads.square().sum(1), 8.0, step)
    reading = unpack(measures.packed().tolist(), 2)
    assert reading.norm[1] > 100 * reading.norm[0] and not any(map(any, reading.runs.values()))


def test_participation_tells_of_each_change_once() -> None:
    watched = Participation(3, CPU)
    everyone = torch.ones(3, dtype=torch.bool)

    def step(number: int, *left_out: int, present: torch.Tensor = everyone) -> None:
        weights = torch.full((2, 3), 1 / 3).double()
        weights[:, list(left_out)] = 0.0
        with NoSynchronisation():
            for row, elements in zip(weights, (10.0, 30.0), strict=True):
                watched.add(MixingDecision(row[None], row[None].any(1)), elements, present)
            watched.end_step(number)

    step(1)
    assert watched.read() == ([1.0, 1.0, 1.0], [])
    step(2, 1)
    kept, changes = watched.read()
    assert kept == [1.0, 0.0, 1.0] and changes == [(1, 2, True)]
    step(3, 1)
    assert watched.read()[1] == []
    step(4, 2)
    step(5)
    kept, changes = watched.read()
    assert kept == [1.0, 1.0, 0.5] and changes == [(1, 4, False), (2, 4, True), (2, 5, False)]
    present = torch.tensor([True, False, True])
    step(6, 1, present=present)  # it has no finite gradient, which is told elsewhere
    assert watched.read()[1] == []
    step(7, 0)
    again = Participation(3, CPU)
    again.load_state_dict({name: value.clone() for name, value in watched.state_dict().items()})
    assert again.read()[1] == [(0, 7, True)]  # which was not told before the checkpoint
    step(8, 0, 1, 2)  # nobody agrees, so nobody is left out
    assert watched.read()[1] == [(0, 7, True), (0, 8, False)]


def test_names_of_numbers() -> None:
    runs = {kind: [0, 0] for kind in KINDS}
    args = ([1.0, 2.0], [0.5, 0.25], [False, False], [1, 0], runs, runs)
    reading = Reading(3.0, 0.5, 0.1, 4.0, -1.0, math.nan, *args)
    found = scalars(reading, 128)
    assert found == {"mean_cosine": 0.5, "min_cosine": 0.1, "trace_covariance": 4.0, "squared_gradient": -1.0}
    found = scalars(reading._replace(noise_scale=2.0), 128)
    assert (found["noise_scale"], found["noise_scale_tokens"]) == (2.0, 256.0)
    assert "noise_scale_tokens" not in scalars(reading._replace(noise_scale=2.0), None)
    assert scalars(reading._replace(steps=0.0), None) == {}
    lists = by_worker(reading, [1.0, 0.0])
    assert flattened(lists)["worker_norm/1"] == 2.0 and flattened(lists)["worker_kept/1"] == 0.0
    assert finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


def test_settings() -> None:
    assert parse_block({}).telemetry is None and parse_block({"telemetry": False}).telemetry is None
    block = parse_block({"telemetry": True})
    assert block.telemetry == TelemetrySettings() and block.sketch_size == 65536
    assert parse_block({"telemetry": True, "gram": "exact"}).sketch_size is None
    assert parse_block({"telemetry": True, "mixing": {"type": "GAF"}}).sketch_size is None
    assert parse_block({"mixing": {"type": "Guard"}}).sketch_size == 65536
    assert parse_block({"telemetry": {"every": 7}, "scaling": {"type": "VRGD"}}).sketch_size == 65536
    assert "telemetry every 7" in parse_block({"telemetry": {"every": 7}}).describe()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("yes", ["gradmix.telemetry: is", "true, false or an object", "every"]),
        (1, ["gradmix.telemetry: is 1"]),
        ({"evry": 3}, ["gradmix.telemetry.evry: unknown key", 'did you mean "every"?']),
        ({"every": 0}, ["gradmix.telemetry.every: is 0", ">= 1"]),
        ({"path": ""}, ["gradmix.telemetry.path"]),
        ({"on_alarm": "halt"}, ["gradmix.telemetry.on_alarm", '"warn" or "stop"']),
        ({"alarm_deviations": 1e999}, ["gradmix.telemetry.alarm_deviations"]),
    ],
)
def test_mistakes_in_the_settings_are_told(value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"telemetry": value})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
