"""LAMB and LARS train under every engine and parallelism as in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support.engines import FP32_SUMS
from tests.support.layouts import Layout
from tests.support.ranks import run_ranks
from tests.support.replay import essence, replay, replays
from tests.support.training import Case, drift, relative, run_cases
from tests.support.trust_ratios import LAMB, LARS

EVERY = {"exclude_one_dimensional": False}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Lamb": {"optimizer": "Lamb", "params": LAMB},
    "LARS": {"optimizer": "LARS", "params": LARS},
    "Lamb, all parameters": {"optimizer": "Lamb", "params": {**LAMB, **EVERY}},
    "LARS, all parameters": {"optimizer": "LARS", "params": {**LARS, **EVERY}},
}
BOTH = ("Lamb", "LARS")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1, "accumulation": 2},
    "ZeRO-2": {"stage": 2, "accumulation": 2},
    "two groups": {"stage": 2, "two_groups": True},
    "round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "round robin, stage 1": {"stage": 1, "zero": {"round_robin_gradients": True}},
    "offload": {"stage": 2, "zero": OFFLOAD},
    "offload, stage 1": {"stage": 1, "zero": OFFLOAD},
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", "config": FP32_SUMS},
    "BF16_Optimizer, two groups": {"stage": 1, "dtype": "bf16", "config": FP32_SUMS, "two_groups": True},
    **{f"ZeRO-{stage} bf16": {"stage": stage, "dtype": "bf16"} for stage in (0, 1, 2)},
}
FLAT = {
    f"{engine}, {name}": Case(None, **options, **OPTIMIZERS[name])
    for engine, options in ENGINES.items()
    for name in BOTH
}
# A step is about 0.01 of the largest weight; bf16 rounds it to 0.004 of a weight.
TOLERANCE = {"fp32": 1e-6, "bf16": 0.02, "fp16": 0.003}

LAYOUTS: dict[str, tuple[Layout, tuple[int, ...], dict[str, Any]]] = {
    "tensor": (Layout(2, tensor=2), (0, 1, 2), {}),
    "AutoTP": (Layout(2, tensor=2, kind="autotp"), (0, 1, 2), {}),
    "pipeline": (Layout(2, pipe=2), (0, 1), {"tied": True}),
    "tensor and pipeline": (Layout(2, tensor=2, pipe=2), (0, 1), {"tied": True}),
    "experts": (Layout(4, expert=2), (0, 1, 2), {"experts": 4}),
    "sequence": (Layout(2, sequence=2), (0, 1, 2), {}),
    "tied": (Layout(2), (0, 2), {"tied": True}),
}
DIVIDED = {
    f"{kind}, ZeRO-{stage}, {name}": Case(
        {} if kind == "sequence" else None,
        layout=layout,
        stage=stage,
        accumulation=2 if stage else 1,
        steps=6,
        **more,
        **OPTIMIZERS[name],
    )
    for kind, (layout, stages, more) in LAYOUTS.items()
    for stage in stages
    for name in (OPTIMIZERS if kind in ("tensor", "pipeline") and stage == 1 else BOTH)
}


@cache
def flat_runs() -> list[dict[str, Any]]:
    return run_ranks(3, run_cases, FLAT)


@cache
def divided_runs(world: int) -> list[dict[str, Any]]:
    cases = {name: case for name, case in DIVIDED.items() if case.layout and case.layout.world == world}
    return run_ranks(world, run_cases, cases, timeout=280)


@cache
def expected() -> dict[str, Any]:
    cases = [essence(case) for case in DIVIDED.values()]
    return run_ranks(1, replays, {repr(case): case for case in cases})[0]


@pytest.mark.parametrize("name", FLAT)
def test_partitions_train_as_one_process(name: str) -> None:
    case, ranks = FLAT[name], [rank[name] for rank in flat_runs()]
    wanted = replay(case, 3, ranks[0]["buckets"])["weights"]
    for rank in ranks:
        assert relative(rank["weights"], wanted) < TOLERANCE[case.dtype]
        np.testing.assert_equal(rank["weights"], ranks[0]["weights"])


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_models_train_as_one_process(name: str) -> None:
    case = DIVIDED[name]
    assert case.layout is not None
    ranks = [rank[name] for rank in divided_runs(case.layout.world)]
    assert drift(ranks) == []
    for rank in ranks:
        assert relative(rank["weights"], expected()[repr(essence(case))]) < TOLERANCE[case.dtype]
