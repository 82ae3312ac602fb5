"""The harness itself: DeepSpeed without a gradmix block trains the small language model alike in every
layout.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.layouts import Layout
from tests.support.ranks import run_ranks
from tests.support.training import Case, alone, drift, furthest, run_cases

# In fp32 sums are taken in another order; in bf16 that moves a few weights by a place or two.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}

CLIPPED = {"gradient_clipping": 0.2}  # by the norm of the whole model's gradient, which is about 1


def _cases() -> dict[str, Case]:
    tensor, pipe = Layout(2, tensor=2), Layout(2, pipe=2)
    cases = {
        "tensor ZeRO-1 bf16 fp32 sums": Case(
            None, layout=tensor, stage=1, dtype="bf16", fp32_sums=True, steps=5
        ),
        "tensor ZeRO-2": Case(None, layout=tensor, stage=2, accumulation=2, config=CLIPPED, steps=5),
        "tensor ZeRO-2 Adam": Case(None, layout=tensor, stage=2, optimizer="Adam", tied=True, steps=5),
        "pipe ZeRO-0": Case(None, layout=pipe, stage=0, accumulation=3, steps=5),
        "pipe ZeRO-0 bf16": Case(
            None, layout=pipe, stage=0, dtype="bf16", accumulation=2, tied=True, steps=5
        ),
        "pipe ZeRO-1": Case(None, layout=pipe, stage=1, accumulation=2, tied=True, steps=5),
        "pipe ZeRO-1 bf16 fp32 sums": Case(
            None, layout=pipe, stage=1, dtype="bf16", fp32_sums=True, accumulation=2, tied=True, steps=5
        ),
        "experts ZeRO-1": Case(None, layout=Layout(4, expert=4), experts=4, stage=1, accumulation=2, steps=5),
        "experts ZeRO-2": Case(None, layout=Layout(4, expert=2), experts=4, stage=2, accumulation=2, steps=5),
    }
    for kind in ("autotp", "megatron"):
        if kind == "autotp" or importlib.util.find_spec("megatron"):
            layout = replace(tensor, kind=kind)
            cases[f"{kind} ZeRO-2"] = Case(None, layout=layout, stage=2, tied=True, config=CLIPPED, steps=5)
    for kind in ("mpu", "state"):
        layout = Layout(2, sequence=2, kind=kind)
        cases[f"sequence by {kind} ZeRO-2"] = Case(
            None, layout=layout, stage=2, accumulation=2, config=CLIPPED, steps=5
        )
    return cases


CASES = _cases()
EIGHT = {
    "pipe and tensor ZeRO-1 bf16 fp32 sums": Case(
        None,
        layout=Layout(2, tensor=2, pipe=2),
        stage=1,
        dtype="bf16",
        fp32_sums=True,
        accumulation=2,
        tied=True,
        steps=5,
    ),
}
MESH = {
    kind: Case(None, layout=Layout(2, sequence=2, kind=kind), stage=1, steps=5) for kind in ("mesh", "config")
}
# With what decides nothing in so few steps, and telemetry.
GUARD = {"mixing": {"type": "Guard", "params": {"agreement": 0.0}}, "telemetry": {"per_parameter": True}}
GUARDED = {
    f"guarded {name}": replace(case, block=GUARD)
    for name, case in {**CASES, **EIGHT}.items()
    if name in ("tensor ZeRO-2", "pipe ZeRO-0 bf16", "pipe ZeRO-1", "experts ZeRO-2")
    or name.startswith(("sequence by mpu", "autotp", "pipe and tensor"))
}
AGAIN = {f"again {name}": case for name, case in reversed(CASES.items()) if case.stage == 0}


def _spawn(cases: dict[str, Case]) -> dict[str, list[Any]]:
    """Results of all ranks, by case; cases of as many ranks share a spawn."""
    results = {}
    for world in sorted({case.layout.world for case in cases.values()}):
        here = {name: case for name, case in cases.items() if case.layout.world == world}
        ranks = run_ranks(world, run_cases, here)
        results.update({name: [rank[name] for rank in ranks] for name in here})
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return _spawn({**CASES, **MESH, **AGAIN, **EIGHT, **GUARDED})


@pytest.fixture(scope="module")
def references() -> dict[str, list[Any]]:
    """What each case would be without model parallelism; and after no step at all."""
    cases = [alone(case) for case in (*CASES.values(), *EIGHT.values(), *MESH.values())]
    cases += [replace(case, steps=0) for case in cases]
    return _spawn({repr(case): case for case in cases})


@pytest.mark.parametrize("name", [*CASES, *EIGHT])
def test_trains_as_without_model_parallelism(
    name: str, results: dict[str, list[Any]], references: dict[str, list[Any]]
) -> None:
    case = {**CASES, **EIGHT}[name]
    reference = references[repr(alone(case))][0]
    for result in results[name]:
        assert furthest(result, reference) < TOLERANCE[case.dtype]
    assert drift(results[name]) == []


def test_a_layout_leaves_nothing_to_the_next(results: dict[str, list[Any]]) -> None:
    for name in AGAIN:
        before = results[name.removeprefix("again ")]
        assert [rank["local"] for rank in results[name]] == [rank["local"] for rank in before]


@pytest.mark.parametrize("name", GUARDED)
def test_guard_and_telemetry_change_nothing_and_are_the_same_on_every_rank(
    name: str, results: dict[str, list[Any]]
) -> None:
    ranks, stock = results[name], results[name.removeprefix("guarded ")]
    assert [rank["local"] for rank in ranks] == [rank["local"] for rank in stock]
    assert drift(ranks) == []
    own = ("seconds", "bytes_sent", "noise_scale_tokens")  # the last is known where tokens are read
    for told in zip(*(rank["stats"] for rank in ranks), strict=True):
        shared = [{k: v for k, v in s.items() if k not in own} for s in told]
        assert all(s == shared[0] for s in shared) and {"mean_cosine", "worker_norm/1"} <= shared[0].keys()
    (state, *others) = [rank["mixing_states"][-1] for rank in ranks]
    assert all(other == state for other in others) and state[1] == [5.0] * len(state[1])


def test_the_same_model_has_the_same_numbers_however_it_is_divided(results: dict[str, list[Any]]) -> None:
    def numbers(name: str) -> list[float]:
        found = [results[f"guarded {name}"][0]["stats"][step] for step in (0, -1)]
        return [s[key] for s in found for key in ("mean_cosine", "trace_covariance", "worker_norm/0")]

    assert numbers("tensor ZeRO-2") == pytest.approx(numbers("sequence by mpu ZeRO-2"), rel=1e-4)
    bf16 = "pipe and tensor ZeRO-1 bf16 fp32 sums"
    assert numbers("pipe ZeRO-1") == pytest.approx(numbers(bf16), rel=0.05)


def test_every_weight_is_trained(references: dict[str, list[Any]]) -> None:
    for case in (*CASES.values(), *EIGHT.values()):
        after = references[repr(alone(case))][0]["weights"]
        before = references[repr(replace(alone(case), steps=0))][0]["weights"]
        for name, weight in after.items():
            assert np.abs(weight - before[name]).max() > 3 * TOLERANCE["fp32"] * np.abs(weight).max(), name


@pytest.mark.parametrize("kind", MESH)
def test_deepspeed_does_not_add_up_gradients_over_the_sequence_ranks_of_a_mesh(
    kind: str, results: dict[str, list[Any]], references: dict[str, list[Any]]
) -> None:
    reference = references[repr(alone(MESH[kind]))][0]
    assert furthest(results[kind][0], reference) > 1e-3
    one, other = (results[kind][rank]["local"] for rank in (0, 1))  # of one replica
    assert one != other
    assert one == results[kind][2]["local"]
