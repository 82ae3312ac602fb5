"""Every combination of docs/parallelism.md's support matrix trains right; others are refused."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

from ds_gradmix.engines.compatibility import ENGINES, PARALLELISM, refused_engine
from tests.support.blocks import BY_PARAMETER, MIX, ROUGH_VRGD, noise, past
from tests.support.layouts import Layout
from tests.support.ranks import run_ranks
from tests.support.replay import essence, replays
from tests.support.support_matrix import SUPPORTED, Cell
from tests.support.training import Case, drift, run_cases
from tests.support.trust_ratios import LAMB, LARS

# Mixing without a Gram matrix, which takes another way, is in the cells of extrapolation: each mixing cell
# has one beside it. GAF is in front of LAMB, PastGradient in front of LARS, VRGD in front of SGD.
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "mixing": {"GAF": {"block": BY_PARAMETER, "optimizer": "Lamb", "params": LAMB, "steps": 3}},
    # Two steps: with few workers ratios amplify the rounding of the model's own gradients.
    "scaling": {"VRGD": {"block": ROUGH_VRGD, "steps": 2}},
    "extrapolation": {
        "PastGradient": {
            "block": {**MIX, **past(lr=0.1)},
            "optimizer": "LARS",
            "params": LARS,
            "steps": 3,
        }
    },
}
# ZeRO-3 refuses PastGradient.
NOISE = {"Noise": {**RULES["extrapolation"]["PastGradient"], "block": {**MIX, **noise(std=0.05)}}}
LAYOUTS = {
    "data": Layout(2),
    "tensor": Layout(2, tensor=2),
    "pipeline": Layout(2, pipe=2),
    "tensor and pipeline": Layout(2, tensor=2, pipe=2),
    "experts": Layout(4, expert=2),
    "sequence": Layout(2, sequence=2),
}
# Of the largest weight: the order of sums in fp32; else some places of the last bits, in a few steps.
# Where a rounding may turn a decision, so that ranks are compared with each other alone, one is by sketch.
SKETCHED = {"fp16": {"gram": {"sketch": 100}}, "bf16": {"gram": {"sketch": 100}, "transport": "exchange"}}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.003}
# Ratios of two workers amplify the rounding of gradients; there, a step is about 0.1 of the largest weight.
ROUGH_TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.03}


def rules_of(cell: Cell) -> dict[str, dict[str, Any]]:
    return NOISE if cell.exception else RULES[cell.slot]


def case_of(cell: Cell, rule: str) -> Case:
    settings = dict(rules_of(cell)[rule])
    if rule == "GAF" and (cell.dtype == "fp16" or cell.engine == "BF16_Optimizer"):
        settings["block"] = {**settings["block"], **SKETCHED[cell.dtype]}
    return Case(
        layout=LAYOUTS[cell.parallelism],
        stage={"BF16_Optimizer": 1}.get(cell.engine) or int(cell.engine[-1]),
        dtype=cell.dtype,
        fp32_sums=cell.engine == "BF16_Optimizer",
        accumulation=2,
        tied="pipeline" in cell.parallelism,
        experts=4 if cell.parallelism == "experts" else 0,
        **settings,
    )


@cache
def results(parallelism: str) -> list[dict[str, Any]]:
    """Of every rank, by (cell, rule)."""
    here = [cell for cell in SUPPORTED if cell.parallelism == parallelism]
    cases = {f"{cell} {rule}": case_of(cell, rule) for cell in here for rule in rules_of(cell)}
    return run_ranks(LAYOUTS[parallelism].world, run_cases, cases, timeout=280)


@cache
def expected() -> dict[str, dict[str, Any]]:
    cases = [essence(case_of(cell, rule)) for cell in SUPPORTED for rule in rules_of(cell)]
    return run_ranks(1, replays, {repr(case): case for case in cases})[0]


@pytest.mark.parametrize("cell", SUPPORTED, ids=str)
def test_supported(cell: Cell) -> None:
    for rule in rules_of(cell):
        ranks = [rank[f"{cell} {rule}"] for rank in results(cell.parallelism)]
        assert drift(ranks) == []
        wanted = expected()[repr(essence(case_of(cell, rule)))]
        tolerance = (ROUGH_TOLERANCE if rule == "VRGD" else TOLERANCE)[cell.dtype]
        largest = max(float(np.abs(w).max()) for w in wanted.values())
        for found in ranks:
            assert found["weights"].keys() == wanted.keys()
            for name, weight in found["weights"].items():
                if rule == "GAF" and cell.dtype != "fp32":
                    assert np.isfinite(weight).all()  # rounding may turn a decision
                else:
                    assert np.abs(weight - wanted[name]).max() / largest < tolerance, name
            assert found["stats"] == ranks[0]["stats"]
            if rule == "GAF":
                assert any(0 < told["kept_fraction"] < 1 for told in found["stats"])


def test_every_cell_of_mixing_has_one_of_extrapolation() -> None:
    mixing = {cell for cell in SUPPORTED if cell.slot == "mixing"}
    assert mixing and {cell._replace(slot="extrapolation") for cell in mixing} <= set(SUPPORTED)


KINDS = [
    set(kinds)
    for size in range(5)
    for kinds in itertools.combinations(("tensor", "pipeline", "experts", "sequence"), size)
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(sorted(kinds)) or "data")
def test_what_is_not_in_the_matrix_is_refused(kinds: set[str]) -> None:
    for engine in ENGINES:
        reason = refused_engine(engine, "bf16", frozenset(kinds))
        assert (reason is None) == any(
            cell.engine == engine and cell.dtype == "bf16" and PARALLELISM[cell.parallelism] == kinds
            for cell in SUPPORTED
        )
