"""The many ways to divide a model: each equals the same model undivided, under the rules."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support.blocks import BY_PARAMETER as GAF
from tests.support.blocks import MIX, SMALL, past
from tests.support.blocks import ROUGH_VRGD as VRGD
from tests.support.layouts import Layout
from tests.support.outside_rules import MODULE
from tests.support.ranks import RankError, run_ranks
from tests.support.replay import essence, replays
from tests.support.training import Case, alone, build, drift, ds_config, furthest, groups_of, run, run_cases

PAST: dict[str, Any] = {**GAF, **past(lr=0.1)}
ALL = {"mixing": {"type": "GAF", "params": {"threshold": 2}}, **SMALL}  # nobody is left out
EXACT = {"gram": {"sketch": 10**5}}  # of parameters that are smaller than a sketch
SUMMED = {"transport": "exchange"}
MODEL = {"mixing": {"type": "GAF", "params": {"threshold": 0.92}}, "scope": "model", **SMALL}
LAYERWISE = {**MODEL, **past(lr=0.02, layerwise=True)}
TEAMS = {  # two ranks a worker, at these stages
    "PastGradient": (PAST, (0, 1, 2)),
    "VRGD": (VRGD, (0, 2)),
    "GradientMix": (MIX, (1,)),
    "sketch": ({**GAF, **EXACT}, (2,)),
}
TOLERANCE = 1e-5


def _replayed() -> dict[str, Case]:
    """Compared with the replay of the reference."""
    cases = {}
    kinds = [("tensor", "autotp"), *((("sequence", kind)) for kind in ("state", "mesh", "config"))]
    if importlib.util.find_spec("megatron"):
        kinds.append(("tensor", "megatron"))
    for axis, kind in kinds:
        layout = Layout(2, kind=kind, **{axis: 2})
        cases[f"{kind} ZeRO-1 GAF"] = Case(GAF, layout=layout, stage=1, accumulation=2, steps=4)
        cases[f"{kind} ZeRO-2 VRGD"] = Case(VRGD, layout=layout, stage=2, steps=2)
        cases[f"{kind} ZeRO-0 PastGradient"] = Case(PAST, layout=layout, stage=0, steps=4)
    for axis, kind, stage in (("tensor", "autotp", 2), ("sequence", "state", 1)):
        layout = Layout(2, kind=kind, **{axis: 2})
        block = {**GAF, **EXACT, **SUMMED}
        cases[f"{kind} ZeRO-{stage} sketch"] = Case(block, layout=layout, stage=stage, steps=4)
    for size in (1, 4):
        layout = Layout(4, expert=size)
        cases[f"experts over {size} ZeRO-1"] = Case(GAF, layout=layout, stage=1, experts=4, steps=4)
        cases[f"experts over {size} ZeRO-2"] = Case(PAST, layout=layout, stage=2, experts=4, steps=4)
    block, layout = {**GAF, **EXACT, **SUMMED}, Layout(4, expert=2)
    cases["experts ZeRO-1 sketch"] = Case(block, layout=layout, stage=1, experts=4, steps=4)
    for name, (block, stages) in TEAMS.items():
        for stage in stages:
            steps, accumulation = 2 if "scaling" in block else 4, 2 if stage == 1 else 1
            pairs = Case(
                {**block, "worker": 2}, layout=Layout(4), stage=stage, accumulation=accumulation, steps=steps
            )
            cases[f"pairs ZeRO-{stage} {name}"] = pairs
    return cases


REPLAYED = _replayed()
ALONE = {  # compared with the undivided model under DeepSpeed, whose buckets for the model are the same
    "tensor ZeRO-1": Case(MODEL, layout=Layout(3, tensor=2), stage=1, accumulation=2, steps=4),
    "tensor ZeRO-0": Case(LAYERWISE, layout=Layout(3, tensor=2), stage=0, steps=4),
    "pipeline ZeRO-1": Case(MODEL, layout=Layout(3, pipe=2), stage=1, accumulation=2, steps=6, tied=True),
    "pipeline ZeRO-0": Case(LAYERWISE, layout=Layout(3, pipe=2), stage=0, steps=6, tied=True),
    "pipeline ZeRO-1 sketch": Case(
        {**MODEL, **EXACT, **SUMMED}, layout=Layout(3, pipe=2), stage=1, accumulation=2, steps=6, tied=True
    ),
    "pipeline ZeRO-0 sketch": Case({**MODEL, **EXACT}, layout=Layout(3, pipe=2), stage=0, steps=6, tied=True),
    "tensor ZeRO-0 sketch": Case({**MODEL, **EXACT}, layout=Layout(3, tensor=2), stage=0, steps=4),
    "pipeline and tensor ZeRO-1": Case(
        MODEL, layout=Layout(2, pipe=2, tensor=2), stage=1, steps=4, tied=True
    ),
}
TRUST = {"mixing": {"type": f"{MODULE}:Trust"}}
BY_PARAMETER = {**TRUST, "scope": "parameter"}
STATEFUL = {  # the same, by a rule from outside that keeps a number of each worker
    "tensor ZeRO-1 state": Case(TRUST, layout=Layout(3, tensor=2), stage=1, accumulation=2, steps=4),
    "tensor ZeRO-2 state by parameter": Case(BY_PARAMETER, layout=Layout(3, tensor=2), stage=2, steps=4),
    "pipeline ZeRO-1 state": Case(
        {**TRUST, "scope": "model"}, layout=Layout(3, pipe=2), stage=1, tied=True, steps=4
    ),
    "pipeline ZeRO-0 state by parameter": Case(BY_PARAMETER, layout=Layout(3, pipe=2), stage=0, steps=4),
}
ALONE |= STATEFUL
STOCK = {
    "experts ZeRO-0": Case(ALL, layout=Layout(4, expert=2), stage=0, experts=4, steps=4),
    "experts ZeRO-1": Case(ALL, layout=Layout(4, expert=2), experts=4, stage=1, accumulation=2, steps=4),
    "experts ZeRO-2": Case(ALL, layout=Layout(4, expert=2), experts=4, stage=2, accumulation=2, steps=4),
    "one worker ZeRO-0": Case({**GAF, "worker": 4}, layout=Layout(4), stage=0, steps=4),
    "one worker ZeRO-1": Case({**GAF, "worker": "node"}, layout=Layout(4), stage=1, accumulation=2, steps=4),
    "experts ZeRO-1, weighed": Case(
        {"nonfinite": "drop"}, layout=Layout(4, expert=2), experts=4, stage=1, steps=4
    ),
}


@cache
def results() -> dict[str, list[dict[str, Any]]]:
    """Of every case all ranks' results; cases of as many ranks share a spawn, and equal ones a run."""
    cases = {**REPLAYED, **ALONE, **STOCK}
    cases |= {f"{name}, undivided": alone(case) for name, case in ALONE.items()}
    cases |= {f"{name}, stock": replace(case, block=None) for name, case in STOCK.items()}
    cases |= {f"{name}, one": replace(case, layout=Layout(4)) for name, case in STOCK.items()}
    found = {}
    for world in sorted({case.layout.world for case in cases.values()}):
        here = {repr(case): case for case in cases.values() if case.layout.world == world}
        ranks = run_ranks(world, run_cases, here, timeout=280)
        found.update({name: [rank[name] for rank in ranks] for name in here})
    return {name: found[repr(case)] for name, case in cases.items()}


@cache
def expected() -> dict[str, Any]:
    return run_ranks(1, replays, {repr(essence(case)): essence(case) for case in REPLAYED.values()})[0]


@pytest.mark.parametrize("name", REPLAYED)
def test_a_divided_model_equals_the_replay(name: str) -> None:
    wanted = expected()[repr(essence(REPLAYED[name]))]
    largest = max(float(np.abs(w).max()) for w in wanted.values())
    ranks = results()[name]
    assert drift(ranks) == []
    for rank in ranks:
        for weight, values in rank["weights"].items():
            assert np.abs(values - wanted[weight]).max() / largest < TOLERANCE, weight
        assert rank["stats"] == ranks[0]["stats"]


@pytest.mark.parametrize("name", ALONE)
def test_one_decision_for_the_whole_model(name: str) -> None:
    reference, ranks = results()[f"{name}, undivided"][0], results()[name]
    assert drift(ranks) == []
    for rank in ranks:
        assert furthest(rank, reference) < TOLERANCE
        assert rank["skipped"] == reference["skipped"]
        kept = [told["kept_fraction"] for told in rank["stats"]]
        assert kept == pytest.approx([told["kept_fraction"] for told in reference["stats"]])
        if name in STATEFUL:
            assert rank["mixing_states"] == ranks[0]["mixing_states"]
            np.testing.assert_allclose(rank["mixing_states"], reference["mixing_states"], rtol=1e-5)
            assert np.ptp(rank["mixing_states"]) > 0
    leaves_out = any(0 < told["kept_fraction"] < 1 for told in reference["stats"])
    assert leaves_out or ALONE[name].layout.data == 2 or name in STATEFUL


@pytest.mark.parametrize("name", STOCK)
def test_what_nobody_is_left_out_of_equals_deepspeed(name: str) -> None:
    for rank, stock, one in zip(
        results()[name], results()[f"{name}, stock"], results()[f"{name}, one"], strict=True
    ):
        assert furthest(rank, stock) < 1e-6
        assert furthest(rank, one) < TOLERANCE


def without_norm() -> None:
    import torch.distributed as dist

    from tests.support import models

    forward = models.Block.forward

    def other(self: Any, x: Any) -> Any:
        if dist.get_rank() % 2:
            self.norm2.requires_grad_(False)
        return forward(self, x)

    models.Block.forward = other
    run(Case({**GAF, "scope": "bucket"}, layout=Layout(2, tensor=2), stage=2, steps=2))


def test_tensor_parallel_ranks_that_differ_do_not_hang() -> None:
    with pytest.raises(RankError, match=r"MismatchError.*norm2"):
        run_ranks(4, without_norm, timeout=60)


def experts_and_tensor() -> None:
    import deepspeed
    import torch

    from tests.support import models, tensor_layers

    case = Case(GAF, layout=Layout(4), stage=1, steps=4)
    model = models.Language(models.Plain(), experts=2)
    optimizer = torch.optim.SGD(groups_of(model, replace(case, experts=2)), lr=0.1)
    mpu = tensor_layers.TensorParallel(2, 2)
    deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=ds_config(case))


REFUSED: dict[str, tuple[Case | None, str]] = {
    "experts and tensor": (None, "experts and tensor parallelism"),
    "pipeline, ZeRO-2": (
        Case(GAF, layout=Layout(2, pipe=2), stage=2, steps=4),
        "DeepSpeed's pipeline takes ZeRO-0 and ZeRO-1",
    ),
    "experts, for the model": (
        Case(MODEL, layout=Layout(4, expert=2), stage=1, experts=4, steps=4),
        "experts are reduced over",
    ),
    "experts, two ranks a worker": (
        Case({**GAF, "worker": 2}, layout=Layout(4, expert=2), stage=1, experts=4, steps=4),
        "gradmix.worker: 2 is not supported with experts",
    ),
    "three ranks a worker": (
        Case({**GAF, "worker": 3}, layout=Layout(4), stage=1, steps=4),
        "gradmix.worker: 3, but a data-parallel group has 4 ranks",
    ),
    "three ranks a worker, ZeRO-0": (
        Case({**GAF, "worker": 3}, layout=Layout(4), stage=0, steps=4),
        "gradmix.worker: 3, but a data-parallel group has 4 ranks",
    ),
    "half a replica a worker": (
        Case({**GAF, "worker": 2}, layout=Layout(1, sequence=4), stage=1, steps=4),
        "4 ranks share a replica by sequence parallelism",
    ),
    "ZeRO-3, tensor": (
        Case(GAF, layout=Layout(2, tensor=2), stage=3, steps=4),
        "ZeRO-3 is supported for data parallelism alone",
    ),
}


def refusals() -> dict[str, str]:
    import ds_gradmix
    from tests.support import layouts

    ds_gradmix.enable()
    found = {}
    for name, (case, _) in REFUSED.items():
        try:
            if case is None:
                experts_and_tensor()
            else:
                build(case)
            found[name] = "built"
        except ds_gradmix.ConfigError as error:
            found[name] = str(error)
        layouts.reset()
    return found


def test_refused_when_the_engine_is_built() -> None:
    for found in run_ranks(4, refusals):
        for name, (_, words) in REFUSED.items():
            assert words in found[name], name
