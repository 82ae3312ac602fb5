"""Guard trains as its replay in float64 with each fault, and bit for bit as the mean without; the numbers of
telemetry are those of the replay, change nothing, and name the worker that is wrong.
"""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from tests.support.engines import FP32_SUMS
from tests.support.guarded import BATCH, Fault, Replayed, Run, replay, train
from tests.support.ranks import run_ranks
from tests.support.reference import agreements

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
T: dict[str, Any] = {"telemetry": True}


def bad(kind: str, worker: int = 1, begin: int = 6, end: int = 10**9) -> tuple[Fault, ...]:
    return (Fault(worker, kind, begin, end),)


# On 3 ranks, a number of workers for which 1/W is not exact.
THREE = {
    "negative": Run(bad("negative"), keys=T, resume_at=11),
    "noise": Run(bad("noise1"), stage=1, accumulation=2, keys=T),
    "noise of 10 times": Run(bad("noise10"), stage=1, keys={"scope": "model"}),
    "noise of 100 times": Run(bad("noise100"), stage=0, keys=T, steps=32),
    "stuck": Run(bad("stuck"), accumulation=2, keys=T),
    "scaled by 1000": Run(bad("scaled"), keys={"gram": "exact", **T}, steps=32),
    "shuffled": Run(bad("shuffled"), keys={"scope": "parameter"}),
    "not finite": Run(bad("nan"), keys={"nonfinite": "drop", **T}),
    "exchange": Run(bad("negative", end=12), keys={"transport": "exchange"}, steps=30),
    "sketched": Run(bad("negative"), keys={"gram": {"sketch": 64}, **T}),
    "negative, ZeRO-3": Run(bad("negative"), stage=3, keys={"gram": "exact", **T}, resume_at=11),
    "exchange, ZeRO-3": Run(bad("negative"), stage=3, keys={"gram": "exact", "transport": "exchange"}),
}
CLEAN = {
    "ZeRO-0": Run(stage=0, steps=8),
    "ZeRO-1": Run(stage=1, accumulation=2, steps=8),
    "ZeRO-2": Run(accumulation=2, steps=8),
    "ZeRO-2 bf16": Run(steps=8, config=BF16),
    "ZeRO-3": Run(stage=3, accumulation=2, steps=8),
    "ZeRO-3 bf16": Run(stage=3, steps=8, config=BF16),
    "BF16_Optimizer": Run(stage=1, steps=8, config={**BF16, **FP32_SUMS}),
    "not contiguous": Run(steps=8, config={"zero_optimization": {"stage": 2, "contiguous_gradients": False}}),
    "drops": Run(steps=8, keys={"nonfinite": "drop"}),
    "summed": Run(stage=1, steps=8, config={"gradient_allreduce_op": "sum"}),
    "without norm": Run(steps=8, config={"zero_optimization": {"stage": 2, "compute_grad_norm": False}}),
}
MEANS = {name: Run(**{**vars(run), "params": None}) for name, run in CLEAN.items()}
WATCHING: dict[str, Any] = {"every": 3, "per_parameter": True}
WATCHED = {
    name: Run(**{**vars(run), "params": None, "keys": {**run.keys, "telemetry": WATCHING}})
    for name, run in CLEAN.items()
}
# On 8 ranks.
EIGHT = {
    "two bad": Run((Fault(2, "negative"), Fault(5, "noise10")), steps=20),
    "from the start": Run(bad("negative", begin=0), steps=14),
    "recovers": Run(bad("negative", worker=6, begin=6, end=10), steps=26),
}


# On 4 ranks, with plain averaging: what looks faulty.
SHORT: dict[str, Any] = {"alarm_steps": 5, "every": 3}
LOOKS = {
    "negative": "pointing away",
    "noise0.2": "never agreeing",
    "noise100": "exploding",
    "scaled": "exploding",
    "stuck": "stuck",
    "zero": "vanishing",
    "nan": "not finite",
    "duplicate": "same as those of rank 2 on ",
}
CLIPPED = {"gradient_clipping": 0.5}  # or the model is soon nowhere, and no worker as the other
FOUR = {kind: Run(bad(kind, begin=8), None, {"telemetry": SHORT}, steps=33, config=CLIPPED) for kind in LOOKS}
FOUR |= {kind: Run(**{**vars(FOUR[kind]), "stage": 3}) for kind in ("negative", "scaled", "zero")}
FOUR |= {f"clean {i}": Run((), None, {"telemetry": SHORT}, steps=60, seed=1 + i) for i in range(1)}


def run_all(runs: dict[str, Run], folder: str) -> dict[str, Any]:
    """On a rank: all runs, one after the other."""
    return {name: train(run, f"{folder}/{name}") for name, run in runs.items()}


@cache
def results(world: int) -> list[dict[str, Any]]:
    runs = EIGHT
    if world == 4:
        runs = FOUR
    if world == 3:
        runs = {**THREE, **CLEAN, **{f"mean {n}": r for n, r in MEANS.items()}}
        runs |= {f"watched {n}": r for n, r in WATCHED.items()}
    with TemporaryDirectory() as folder:
        return run_ranks(world, run_all, runs, folder)


@cache
def replayed(world: int, name: str) -> Replayed:
    return replay({**THREE, **EIGHT}[name], world)


@pytest.mark.parametrize(("world", "name"), [*((3, name) for name in THREE), *((8, name) for name in EIGHT)])
def test_trains_as_the_replay_says(world: int, name: str) -> None:
    run, ranks, expected = {**THREE, **EIGHT}[name], results(world), replayed(world, name)
    if name == "sketched":  # agreement is known to 1/8, far from the threshold
        assert [s["kept_fraction"] for s in ranks[0][name]["stats"]][-5:] == [2 / 3] * 5
        return
    for result in ranks:
        for parameter, wanted in expected.weights.items():
            np.testing.assert_allclose(result[name]["weights"][parameter], wanted, atol=1e-6)
        kept = [s["kept_fraction"] for s in result[name]["stats"]]
        if run.keys.get("scope") != "parameter" and run.keys.get("nonfinite") is None:
            assert kept == pytest.approx([sum(keep) / world for keep in expected.kept], abs=1e-9)
        (state,) = result[name]["states"]
        np.testing.assert_allclose(state[0], expected.state[0], atol=1e-5)
        assert state[1] == [expected.state[1]] * world
    if name not in (
        "noise of 100 times",
        "scaled by 1000",
        "stuck",
    ):  # these are clipped, or not seen by then
        assert min(sum(keep) for keep in expected.kept) == world - len(run.faults)


def test_left_out_and_back_are_told_once_with_rank_and_host() -> None:
    for world, name in ((3, "negative"), (8, "recovers"), (8, "two bad"), (3, "exchange")):
        kept = replayed(world, name).kept
        expected = []
        for step, (before, now) in enumerate(zip([[True] * world, *kept], kept, strict=False), start=1):
            for worker, (was, has) in enumerate(zip(before, now, strict=True)):
                if was != has:
                    what = "back in the mean" if has else "left out of the mean"
                    expected.append((f"step {step}: rank {worker} on ", f" is {what}"))
        lines = [line for line in results(world)[0][name]["lines"] if "the mean" in line]
        assert expected and len(lines) == len(expected)
        for line, (start, end) in zip(lines, expected, strict=True):
            assert start in line and end in line
        assert not [line for line in results(world)[1][name]["lines"] if "the mean" in line]


@pytest.mark.parametrize("name", CLEAN)
def test_without_a_fault_it_is_the_mean_bit_for_bit(name: str) -> None:
    for result in results(3):
        wanted = result[f"mean {name}"]["weights"]
        for other in (name, f"watched {name}"):
            for parameter, values in result[other]["weights"].items():
                assert np.array_equal(values, wanted[parameter])
        assert all(s["kept_fraction"] == 1.0 for s in result[name]["stats"])
        if name != "drops":
            assert result[f"mean {name}"]["stats"] == [{}] * MEANS[name].steps
        told = result[f"watched {name}"]["stats"][-1]
        assert told["mean_cosine"] > 0.1 and told["worker_norm/2"] > 0 and told["noise_scale"] > 0


@pytest.mark.parametrize("name", [name for name, run in THREE.items() if "telemetry" in run.keys])
def test_numbers_are_those_of_the_replay(name: str) -> None:
    run = THREE[name]
    if name == "sketched":
        return
    samples = BATCH * (run.accumulation if run.stage < 2 else 1)
    trace = square = 0.0
    for step, gram in enumerate(replayed(3, name).grams):
        mean = gram.sum() / 9
        s = samples * (np.trace(gram) - 3 * mean) / 2
        g = mean - s / (3 * samples)
        trace, square = 0.95 * trace + 0.05 * s, 0.95 * square + 0.05 * g
        norms = np.sqrt(np.diag(gram))
        scale = np.outer(norms, norms)
        pairs = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)[~np.eye(3, dtype=bool)]
        expected = {"mean_cosine": pairs.mean(), "min_cosine": pairs.min(), "trace_covariance": s}
        expected |= {"squared_gradient": g} | ({"noise_scale": trace / square} if square > 0 else {})
        expected |= {f"worker_norm/{i}": norm for i, norm in enumerate(norms)}
        expected |= {f"worker_agreement/{i}": value for i, value in enumerate(agreements(gram))}
        for rank in results(3):
            found = rank[name]["stats"][step]
            if step == run.resume_at:
                continue  # its running means come from the checkpoint
            assert ("noise_scale" in found) == (square > 0)
            for key, value in expected.items():
                tolerance = max(norms) ** 2 if key in ("trace_covariance", "squared_gradient") else 1.0
                assert found[key] == pytest.approx(value, rel=1e-4, abs=2e-6 * tolerance), key
    assert found["seconds"] > 0 and found["bytes_sent"] > 0


def test_the_worker_that_is_wrong_is_named_once() -> None:
    """Those that can be known by then; all of them are in tests/unit/test_telemetry.py."""
    expected = {"not finite": "not finite", "noise of 100 times": "exploding", "scaled by 1000": "exploding"}
    for name, what in expected.items():
        lines = [line for line in results(3)[0][name]["lines"] if "looks faulty" in line]
        assert len(lines) == 1 and "rank 1 on " in lines[0] and what in lines[0], (name, lines)


@pytest.mark.parametrize("kind", LOOKS)
def test_a_fault_of_one_of_four_workers_is_told_once(kind: str) -> None:
    lines = [line for line in results(4)[0][kind]["lines"] if "looks faulty" in line]
    partners = [line for line in lines if "rank 2 on " in line.partition(" looks ")[0]]
    assert len(partners) == (kind == "duplicate")
    (line,) = [line for line in lines if line not in partners]
    assert "rank 1 on " in line and LOOKS[kind] in line, line
    assert 8 < int(line.partition("step ")[2].partition(":")[0]) <= 33
    assert not [line for line in results(4)[1][kind]["lines"] if "looks faulty" in line]


def test_runs_without_a_fault_give_no_alarm() -> None:
    """Twenty of each kind are in tests/unit/test_telemetry.py."""
    for name in FOUR:
        if name.startswith("clean"):
            assert not [line for line in results(4)[0][name]["lines"] if "faulty" in line], name


def test_readings_are_means_over_the_steps_between() -> None:
    told = results(3)[0]["watched ZeRO-2"]["stats"]
    assert ["mean_cosine" in s for s in told[:3]] == [False, False, True]
    assert all((s["kept_fraction"], s["effective_workers"], s["skipped"]) == (1.0, 3.0, 0.0) for s in told)
    assert told[2]["mean_cosine"] == told[3]["mean_cosine"] != told[5]["mean_cosine"]
