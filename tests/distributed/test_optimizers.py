"""LAMB and LARS in DeepSpeed: who gives them, what is refused, skipped steps, checkpoints, what is sent."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.blocks import BOTH, GAF, TINY, past
from tests.support.engines import ENGINES
from tests.support.layouts import Layout
from tests.support.models import Regression
from tests.support.ranks import run_ranks
from tests.support.replay import replay
from tests.support.training import (
    Case,
    build,
    drift,
    ds_config,
    equal,
    loss_of,
    relative,
    run_cases,
    train,
    weights_of,
)
from tests.support.trust_ratios import LAMB, LARS
from tests.support.zero3 import to_universal

KINDS: dict[str, dict[str, Any]] = {
    "Lamb": {"optimizer": "Lamb", "params": LAMB},
    "LARS": {"optimizer": "LARS", "params": LARS},
}
FP16 = {f"ZeRO-{stage} fp16": {"stage": stage, "dtype": "fp16", "layout": Layout(2)} for stage in (0, 1, 2)}
OFFLOAD = {"offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}}
ELASTIC = {"elastic": {"stage": 2, "zero": {"elastic_checkpoint": True}}}
EVERYWHERE: dict[str, dict[str, Any]] = {**ENGINES, **FP16, **OFFLOAD, **ELASTIC}


def state_of(engine: Any) -> dict[str, Any]:
    """All that a skipped step leaves as it is."""
    optimizer = engine.basic_optimizer
    return {
        "weights": weights_of(engine),
        "state": [s[name].clone() for s in optimizer.state.values() for name in sorted(s)],
        "masters": [p.detach().clone() for group in optimizer.param_groups for p in group["params"]],
        "steps": [group["step"] for group in optimizer.param_groups],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(a, b) for key in ("state", "masters") for a, b in zip(one[key], other[key], strict=True)]
    kept = all(torch.equal(a, b) for a, b in pairs) and one["steps"] == other["steps"]
    return kept and equal(one["weights"], other["weights"])


def train_on(engine: Any, case: Case, first: int, last: int) -> None:
    """Every rank on the same batches, so that it does not matter how many there are."""
    for step in range(first, last):
        engine.backward(loss_of(engine, step, 0, 0, case))
        engine.step()


# --- who gives the optimizer ---


def given() -> dict[str, Any]:
    import deepspeed

    import ds_gradmix
    from ds_gradmix.optim import Lamb

    ds_gradmix.enable()
    case, ends = Case(None, steps=3, **KINDS["Lamb"]), {}
    ends["config"] = train(build(case), case)["weights"]
    config = {k: v for k, v in ds_config(case).items() if not k.startswith("zero_")} | {
        "zero_optimization": {"stage": 2}
    }
    makes: dict[str, Any] = {
        "upper case": {"config": config | {"optimizer": {"type": "LAMB", "params": LAMB}}},
        "instance": {"optimizer": lambda model: Lamb(model.parameters(), **LAMB)},
        "callable": {"optimizer": lambda _: functools.partial(Lamb, **LAMB)},
        "callable, offload": {
            "optimizer": lambda _: functools.partial(Lamb, **LAMB),
            "config": config
            | {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
        },
    }
    for name, make in makes.items():
        model = Regression()
        optimizer = make.get("optimizer", lambda _: None)(model)
        options = {
            "config": {k: v for k, v in config.items() if k != "optimizer" or optimizer is None},
            **make,
            "optimizer": optimizer,
        }
        ends[name] = train(deepspeed.initialize(model=model, **options)[0], case)["weights"]
    ds_gradmix.disable()
    model = Regression()
    config |= {"zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model, optimizer=Lamb(model.parameters(), **LAMB), config=config)[0]
    before = weights_of(engine)
    try:
        train(engine, case)
    except RuntimeError as error:
        ends["not enabled"] = (str(error), equal(before, weights_of(engine)))
    return ends


def test_the_config_or_the_script_gives_the_optimizer() -> None:
    for ends in run_ranks(2, given):
        told, unchanged = ends.pop("not enabled")
        assert "--module ds_gradmix" in told and unchanged
        assert len(ends) == 5 and all(equal(end, ends["config"]) for end in ends.values())


# --- what is refused ---


def refusals() -> dict[str, str]:
    import deepspeed
    import pytorch_optimizer

    import ds_gradmix
    from ds_gradmix.optim import Lars

    class FusedLamb(torch.optim.SGD):
        """DeepSpeed's has to be compiled for a GPU."""

    ds_gradmix.enable()

    def start(optimizer: Any = None, section: Any = None, **config: Any) -> None:
        model = Regression()
        settings = ds_config(Case(None)) | {"zero_optimization": {"stage": 2}} | config
        settings.pop("optimizer")
        if section is not None:
            settings["optimizer"] = section
        client = None if optimizer is None else optimizer(model)
        deepspeed.initialize(model=model, optimizer=client, config=settings)

    def fused(model: Any) -> Any:
        return FusedLamb(model.parameters(), lr=0.1)

    zero0 = {"stage": 0}
    bf16 = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    tries: dict[str, Any] = {
        "fused": lambda: start(fused),
        "fused, with a block": lambda: start(fused, gradmix=GAF),
        "fused, by a callable": lambda: start(lambda _: lambda params: FusedLamb(params, lr=0.1)),
        "fused, BF16_Optimizer": lambda: start(fused, **bf16),
        "fused, ZeRO-0": lambda: start(fused, zero_optimization=zero0),
        "another": lambda: start(lambda model: pytorch_optimizer.LARS(model.parameters())),
        "universal": lambda: start(section={"type": "LARS"}, checkpoint={"load_universal": True}),
        "universal, given": lambda: start(
            lambda m: Lars(m.parameters()), checkpoint={"load_universal": True}
        ),
        "unknown": lambda: start(section={"type": "lamb", "params": {"beta": 0.9, "max_grad_norm": 1.0}}),
        "wrong": lambda: start(section={"type": "LAMB", "params": {"betas": [0.9, 1.5]}}),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "built"
        except ds_gradmix.ConfigError as error:
            found[name] = str(error)
    return found


REFUSED = {
    "fused": "optimizer: FusedLamb steps on flat partitions of many parameters with ZeRO-2",
    "fused, with a block": 'use "optimizer": {"type": "Lamb"}',
    "fused, by a callable": "optimizer: FusedLamb steps on flat partitions",
    "fused, BF16_Optimizer": "one trust ratio for each of them",
    "fused, ZeRO-0": "built",
    "another": "ds_gradmix.optim.Lamb or Lars",
    "universal": "checkpoint.load_universal: true, but ds_to_universal knows",
    "universal, given": "not that of LARS",
    "unknown": "optimizer.params.beta: unknown key (value 0.9); allowed: lr, betas,",
    "wrong": "optimizer.params.betas: 1.5, but allowed is a number of at least 0 and below 1",
}


def test_refused_when_the_engine_is_built() -> None:
    first, second = run_ranks(2, refusals)
    assert first == second
    for name, words in REFUSED.items():
        assert words in first[name], f"{name}: {first[name]}"
    assert 'set "gradient_clipping"' in first["unknown"].splitlines()[1]


# --- skipped steps ---


def skipping() -> dict[str, bool]:
    """Whether a step that nobody agrees on, or that overflows, leaves everything; and one before does not."""
    found = {}
    for (kind, optimizer), (name, options) in every_engine():
        case = Case({**GAF, **TINY}, **options, **optimizer)
        engine = build(case)
        start = weights_of(engine)
        set_threshold(engine, 2.0)
        train(engine, case, 0, 1)
        before = state_of(engine)
        if case.dtype == "fp16":
            nan = Case(case.block, nan_at=(1, 0), **options, **optimizer)
            set_threshold(engine, 2.0)
            train(engine, nan, 1, 2)
        else:
            set_threshold(engine, 0.0)
            train(engine, case, 1, 2)
        skipped = engine.skipped_steps == 1
        found[f"{name} {kind}"] = (
            skipped and same(before, state_of(engine)) and not equal(start, before["weights"])
        )
    return found


def set_threshold(engine: Any, threshold: float) -> None:
    object.__setattr__(engine.optimizer.gradmix.config.mixing, "threshold", threshold)


def every_engine() -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    for kind in KINDS.items():
        for engine in EVERYWHERE.items():
            yield kind, engine


def test_a_skipped_step_leaves_everything() -> None:
    for found in run_ranks(2, skipping):
        assert len(found) == 2 * len(EVERYWHERE) and all(found.values()), found


# --- checkpoints ---


def resuming(folder: str) -> dict[str, bool]:
    found = {}
    for (kind, optimizer), (name, options) in every_engine():
        case = Case({**BOTH, **TINY} if options.get("stage") else None, **options, **optimizer)
        engine = build(case)
        train(engine, case, 0, 3)
        engine.save_checkpoint(f"{folder}/{name} {kind}")
        torch.distributed.barrier()
        train(engine, case, 3, 6)
        resumed = build(case)
        assert resumed.load_checkpoint(f"{folder}/{name} {kind}")[0] is not None
        train(resumed, case, 3, 6)
        found[f"{name} {kind}"] = same(state_of(engine), state_of(resumed))
    return found


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    for found in run_ranks(2, resuming, str(tmp_path)):
        assert len(found) == 2 * len(EVERYWHERE) and all(found.values()), found


WAYS = {f"ZeRO-{stage}": Case(None, stage=stage, **KINDS["Lamb"]) for stage in (1, 2)}


def before_the_change(folder: str) -> dict[str, Any]:
    """Three ranks: save in the middle, and go on to the end."""
    ends = {}
    for name, case in WAYS.items():
        engine = build(case)
        train_on(engine, case, 0, 3)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"universal_checkpoint_info": {}})
        torch.distributed.barrier()
        train_on(engine, case, 3, 6)
        ends[name] = weights_of(engine)
    return ends


def after_the_change(folder: str) -> dict[str, Any]:
    """As many ranks as there are now: load, and go on."""
    ends = {}
    for name, case in WAYS.items():
        engine = build(replace(case, config={"checkpoint": {"load_universal": True}}))
        assert engine.load_checkpoint(f"{folder}/{name}", tag="universal")[0] is not None
        train_on(engine, case, 3, 6)
        ends[name] = weights_of(engine)
    return ends


def test_fewer_ranks_go_on_from_a_universal_checkpoint(tmp_path: Path) -> None:
    wanted = run_ranks(3, before_the_change, str(tmp_path))[0]
    for name in WAYS:
        to_universal(tmp_path / name)
    for found in run_ranks(2, after_the_change, str(tmp_path)):
        for name, end in found.items():
            assert relative(end, wanted[name]) < 1e-6, name


# --- what is sent, and where ---


def sums() -> dict[str, list[tuple[int, str]]]:
    from ds_gradmix.comm.groups import RankGroup

    sent: list[tuple[int, str]] = []
    all_reduce = RankGroup.all_reduce

    def noting(self: Any, values: torch.Tensor) -> None:
        sent.append((values.numel(), str(values.dtype)))
        all_reduce(self, values)

    RankGroup.all_reduce = noting  # type: ignore[method-assign]
    found = {}
    for stage in (0, 1, 2):
        case = Case(None, stage=stage, two_groups=True, steps=2, **KINDS["Lamb"])
        engine = build(case)
        sent.clear()
        train(engine, case)
        found[f"ZeRO-{stage}"] = list(sent)
    return found


def test_one_all_reduce_of_two_numbers_a_parameter() -> None:
    """A step and group: of the four matrices, and of the three biases and the scale."""
    for found in run_ranks(2, sums):
        assert found["ZeRO-0"] == []
        assert found["ZeRO-1"] == found["ZeRO-2"] == [(2 * 4, "torch.float64")] * 4


TIED: dict[str, Any] = {"layout": Layout(2, pipe=2), "tied": True, "steps": 50}
ALL = {"exclude_one_dimensional": False}
PIPELINES = {
    f"{engine} {kind}": Case(
        {**GAF, **past(lr=0.01)} if kind == "Lamb" else None,
        **TIED,
        **options,
        **{**KINDS[kind], "params": {**KINDS[kind]["params"], **ALL}},
    )
    for engine, options in {
        "ZeRO-0": {"stage": 0},
        "ZeRO-1": {"stage": 1},
        "BF16_Optimizer": ENGINES["BF16_Optimizer"],
    }.items()
    for kind in KINDS
}


@cache
def pipelines() -> list[dict[str, Any]]:
    return run_ranks(4, run_cases, PIPELINES, timeout=280)


@pytest.mark.parametrize("name", PIPELINES)
def test_tied_weights_stay_equal_on_both_stages(name: str) -> None:
    ranks = [rank[name] for rank in pipelines()]
    assert drift(ranks) == []
    assert all(np.isfinite(w).all() for rank in ranks for w in rank["weights"].values())


# --- with extrapolation: the extrapolated LARS and LAMB of Lin et al. ---

AHEAD = {
    f"{kind} ZeRO-{stage}": Case(past(lr=0.02, layerwise=True), stage=stage, **KINDS[kind])
    for kind in KINDS
    for stage in (0, 2)
}


def test_extrapolated_lars_and_lamb() -> None:
    ranks = run_ranks(3, run_cases, AHEAD)
    for name, case in AHEAD.items():
        wanted = replay(case, 3, ranks[0][name]["buckets"])["weights"]
        plain = replay(
            Case(None, stage=case.stage, optimizer=case.optimizer, params=case.params),
            3,
            ranks[0][name]["buckets"],
        )
        for rank in ranks:
            assert relative(rank[name]["weights"], wanted) < 1e-5
        assert relative(plain["weights"], wanted) > 1e-3
