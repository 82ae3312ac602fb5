"""What several ranks keep stays bit for bit equal under every rule: replicas of tensor-parallel ranks, tied
embeddings on two pipeline stages; and all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from tests.support.blocks import SMALL, past
from tests.support.layouts import Layout
from tests.support.ranks import run_ranks
from tests.support.training import Case, drift, run_cases

STEPS = 12


def gaf(threshold: float, **more: Any) -> dict[str, Any]:
    return {"mixing": {"type": "GAF", "params": {"threshold": threshold}}, **SMALL, **more}


def mix(**params: Any) -> dict[str, Any]:
    return {"mixing": {"type": "GradientMix", "params": params}, **SMALL}


def vrgd(**params: Any) -> dict[str, Any]:
    return {"scaling": {"type": "VRGD", "params": params}, **SMALL}


# Thresholds at which some of three workers are left out at most steps, and some agree.
BLOCKS: dict[str, dict[str, Any]] = {
    "gradientmix by parameter": mix(granularity="parameter"),
    "gaf": gaf(0.92),
    "gaf by parameter": gaf(0.85, scope="parameter"),
    "gaf for the model": gaf(0.92, scope="model"),
    "all three, layerwise": {
        **gaf(0.85, scope="parameter"),
        **vrgd(momentum=0.5),
        **past(lr=0.01, layerwise=True),
    },
    "noise": {
        **gaf(0.85, scope="parameter"),
        "extrapolation": {"type": "Noise", "params": {"std_ratio": 0.01}},
    },
}
FEW = ("all three, layerwise",)
TENSOR = ("gaf by parameter", "all three, layerwise")
PIPELINE = ("gradientmix by parameter", "gaf by parameter", "all three, layerwise", "noise")
# With two workers a decision for a bucket or the model is to skip the step: these have three.
WHOLE = ("gaf", "gaf for the model")
TIED = {"tied": True}
RUNS: dict[str, tuple[Layout, dict[str, Any], Sequence[str]]] = {
    "tensor, ZeRO-1": (Layout(2, tensor=2), {"stage": 1}, TENSOR),
    "tensor, ZeRO-1, three workers": (Layout(3, tensor=2), {"stage": 1}, WHOLE),
    "tensor, ZeRO-2, bf16": (Layout(2, tensor=2), {"stage": 2, "dtype": "bf16"}, FEW),
    "tensor, ZeRO-0": (Layout(2, tensor=2), {"stage": 0}, FEW),
    "pipeline, ZeRO-1": (Layout(2, pipe=2), {"stage": 1, **TIED}, PIPELINE),
    "pipeline, ZeRO-1, three workers": (Layout(3, pipe=2), {"stage": 1, **TIED}, WHOLE),
    "pipeline, ZeRO-0": (Layout(2, pipe=2), {"stage": 0, **TIED}, FEW),
    "pipeline, BF16_Optimizer": (
        Layout(2, pipe=2),
        {"stage": 1, **TIED, "dtype": "bf16", "fp32_sums": True},
        FEW,
    ),
}


@cache
def runs(world: int) -> list[dict[str, Any]]:
    cases = {
        f"{name}: {rule}": Case(BLOCKS[rule], layout=layout, steps=STEPS, **options)
        for name, (layout, options, rules) in RUNS.items()
        for rule in rules
        if layout.world == world
    }
    return run_ranks(world, run_cases, cases, timeout=290)


@pytest.mark.parametrize("name", RUNS)
def test_what_ranks_have_in_common_stays_equal(name: str) -> None:
    layout, _, rules = RUNS[name]
    for rule in rules:
        ranks = [rank[f"{name}: {rule}"] for rank in runs(layout.world)]
        assert drift(ranks) == [], rule
        for rank in ranks:
            assert rank["stats"] == ranks[0]["stats"] and rank["skipped"] == ranks[0]["skipped"], rule
        if "gaf" in rule:
            dropping = [told["kept_fraction"] < 1 for told in ranks[0]["stats"]]
            assert sum(dropping) > STEPS / 2 > ranks[0]["skipped"][-1], rule
