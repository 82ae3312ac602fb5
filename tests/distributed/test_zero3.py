"""Training under ZeRO-3 equals a replay in one process, and stock DeepSpeed where it should."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import ds_gradmix
from tests.support.blocks import BOTH, MIX, SKETCH, SUMMED, TINY, VRGD
from tests.support.engines import FP32_SUMS, log_lines
from tests.support.ranks import failures, run_ranks
from tests.support.replay import replay
from tests.support.training import (
    Case,
    build,
    ds_config,
    equal,
    loss_of,
    relative,
    run_cases,
    train,
    weights_of,
    with_stock,
    without_block,
)
from tests.support.zero3 import (
    ALL_PERSISTENT,
    EXACT,
    GAF,
    IN_PARTS,
    OFFLOAD,
    OFFLOAD_OPTIMIZER,
    SMALL,
    by_every_way,
    stage3,
)

SMOOTH: dict[str, Any] = {"scaling": {"type": "VRGD", "params": {"gamma": 0.2, "momentum": 0.8}}}
GUARD: dict[str, Any] = {"mixing": {"type": "Guard"}}
KEEP_ALL: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 2}}}
SKIPS: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 0.6}}}
CASES: dict[str, Case] = {
    "gaf": stage3({**GAF, **EXACT, **TINY}, accumulation=2),
    "gaf small buckets": stage3({**GAF, **EXACT, **TINY}, bucket=SMALL, accumulation=2, zero=IN_PARTS),
    "gaf by parameter": stage3({**GAF, **EXACT, "scope": "parameter"}, bucket=SMALL),
    "gaf by sketch": stage3({**GAF, **TINY, **SKETCH}, bucket=SMALL, zero=IN_PARTS, accumulation=2),
    "gaf by sketch, summed": stage3({**GAF, **TINY, **SKETCH, **SUMMED}, bucket=SMALL),
    "gradientmix": stage3(MIX, bucket=SMALL, accumulation=2, zero=ALL_PERSISTENT),
    "vrgd": stage3({**VRGD, **TINY}, bucket=SMALL, zero=IN_PARTS),
    "vrgd momentum": stage3({**SMOOTH, **TINY}, accumulation=2, bucket=SMALL, zero=IN_PARTS),
    "gaf vrgd, two groups": stage3({**BOTH, **TINY}, two_groups=True, bucket=SMALL, accumulation=2),
    "no overlap": stage3({**BOTH, **TINY}, zero={"overlap_comm": False}, bucket=SMALL),
    "not contiguous": stage3({**BOTH, **TINY}, zero={"contiguous_gradients": False}, bucket=SMALL),
    "not contiguous, sketch": stage3({**GAF, **SKETCH}, zero={"contiguous_gradients": False}),
    "offload": stage3({**BOTH, **TINY}, zero=OFFLOAD, bucket=SMALL, accumulation=2),
    "offload of the optimizer": stage3({**SMOOTH, **TINY}, zero={**OFFLOAD_OPTIMIZER, **IN_PARTS}),
    "skips": stage3({**SKIPS, **EXACT}, steps=6),
    "skips, offload": stage3({**SKIPS, **EXACT}, zero=OFFLOAD_OPTIMIZER, steps=6),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"accumulation": 2, "bucket": SMALL},
    "in parts": {"bucket": SMALL, "zero": IN_PARTS},
    "persistent": {"zero": ALL_PERSISTENT},
    "overlap": {"zero": {"overlap_comm": True}, "bucket": SMALL},
    "not contiguous": {"zero": {"contiguous_gradients": False}, "bucket": SMALL},
    "offload": {"zero": {**OFFLOAD, **IN_PARTS}, "accumulation": 2},
    "bf16": {"dtype": "bf16", "accumulation": 2, "bucket": SMALL},
    "bf16, fp32 sums": {"dtype": "bf16", "accumulation": 2, "config": FP32_SUMS},
    "bf16, offload, fp32 sums": {"dtype": "bf16", "config": FP32_SUMS, "zero": OFFLOAD},
    "bf16, sent in fp32": {"dtype": "bf16", "config": {"communication_data_type": "fp32"}},
    "clipping": {"config": {"gradient_clipping": 0.3}},
}
SAME: dict[str, dict[str, Any]] = {
    "stock": {},
    "guard": {**GUARD, "telemetry": True},
    "weighted": {**KEEP_ALL, **SKETCH},
    "exchanged": {**KEEP_ALL, **TINY, **EXACT},
}
STOCK = {
    f"{name}, {rule}": stage3(block, steps=2, **settings)
    for name, settings in SETTINGS.items()
    for rule, block in SAME.items()
}


@cache
def runs() -> list[dict[str, Any]]:
    return run_ranks(3, run_cases, CASES)


@cache
def stock_runs() -> list[dict[str, Any]]:
    return run_ranks(2, run_cases, with_stock(STOCK))


@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_replay(name: str) -> None:
    ranks = [rank[name] for rank in runs()]
    expected = replay(CASES[name], 3, ranks[0]["buckets"])
    for rank in ranks:
        assert relative(rank["weights"], expected["weights"]) < 1e-5
        assert rank["skipped"] == expected["skipped"]
        assert rank["stats"] == ranks[0]["stats"]
        np.testing.assert_equal(rank["weights"], ranks[0]["weights"])  # bit for bit
    if name.startswith("skips"):
        assert 0 < expected["skipped"][-1] < CASES[name].steps
    if name.startswith("gaf"):
        assert any(0 < told["kept_fraction"] < 1 for told in ranks[0]["stats"])


@pytest.mark.parametrize("name", STOCK)
def test_mean_equals_stock(name: str) -> None:
    """With two workers sums have no order."""
    ranks, case = stock_runs(), STOCK[name]
    same = relative(ranks[0][name]["weights"], ranks[0][repr(without_block(case))]["weights"])
    if name.endswith(("stock", "guard")):
        assert same == 0.0
    else:
        assert same < (3e-2 if case.dtype == "bf16" else 1e-6)
    assert ranks[0][name]["skipped"][-1] == 0


class Branches(torch.nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = torch.nn.Linear(13, 31)
        self.second = torch.nn.Linear(13, 31)
        self.last = torch.nn.Linear(31, 3)
        self.use = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh((self.first if self.use == 0 else self.second)(x)))


def unused() -> None:
    """A parameter that is used in one step and not in the next has no gradient there, also where gradients
    are accumulated or offloaded: with SGD without momentum it stays. (Stock takes the last one again.)
    """
    for zero, block in (({}, {}), (OFFLOAD_OPTIMIZER, {**VRGD, **TINY})):
        for accumulation in (1, 2):
            case = stage3(block, accumulation=accumulation, zero=zero)
            model = Branches()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine = ds_gradmix.initialize(model=model, optimizer=optimizer, config=config_of(case))[0]
            for step, uses in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
                before = weights_of(engine)
                for micro in range(accumulation):
                    model.use = uses[micro]
                    engine.backward(loss_of(engine, step, micro, rank(), case))
                    engine.step()
                after = weights_of(engine)
                for number, name in enumerate(("first.weight", "second.weight")):
                    moved = not np.array_equal(after[name], before[name])
                    assert moved == (number in uses[:accumulation]), (case, step, name)


def discarded() -> None:
    """Gradients before `zero_grad` count no more, nor do those of a parameter that is frozen later."""
    for zero in ({}, OFFLOAD_OPTIMIZER):
        case = stage3({**VRGD, **TINY}, accumulation=2, zero=zero)
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = ds_gradmix.initialize(model=model, optimizer=optimizer, config=config_of(case))[0]

        def backward(micro: int, use: int) -> None:
            engine.module.use = use  # noqa: B023
            engine.backward(loss_of(engine, 0, micro, rank(), case))  # noqa: B023

        before = weights_of(engine)
        backward(0, use=0)
        engine.optimizer.zero_grad()
        for micro in (0, 1):
            backward(micro, use=1)
            engine.step()
        after = weights_of(engine)
        assert np.array_equal(after["first.weight"], before["first.weight"])
        assert not np.array_equal(after["second.weight"], before["second.weight"])
        engine.module.second.requires_grad_(False)
        for micro in (0, 1):
            backward(micro, use=1)
            engine.step()
        assert np.array_equal(weights_of(engine)["second.weight"], after["second.weight"])
        assert not np.array_equal(weights_of(engine)["last.weight"], after["last.weight"])


def config_of(case: Case) -> dict[str, Any]:
    return {key: value for key, value in ds_config(case).items() if key != "optimizer"}


def rank() -> int:
    return torch.distributed.get_rank()


def resumed() -> None:
    """A resumed run goes on bit for bit, with the state of rules, also by zero_to_fp32's weights."""
    case = stage3({**SMOOTH, **TINY, "telemetry": True}, accumulation=2, zero=IN_PARTS)
    guard = stage3({**GUARD, "telemetry": True}, zero=ALL_PERSISTENT)
    lamb = stage3({**VRGD, **TINY}, optimizer="Lamb", params={"lr": 0.01}, zero=IN_PARTS)
    for number, run in enumerate((case, guard, lamb)):
        folders = [tempfile.mkdtemp() if rank() == 0 else ""]
        torch.distributed.broadcast_object_list(folders)
        engine = build(run)
        train(engine, run, 0, 3)
        engine.save_checkpoint(folders[0])
        at_save = weights_of(engine)
        whole = train(engine, run, 3, 6)
        again = build(run)
        with log_lines() as lines:
            again.load_checkpoint(folders[0])
        assert not lines, lines
        assert equal(train(again, run, 3, 6)["weights"], whole["weights"]), number
        if rank() == 0:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            found = get_fp32_state_dict_from_zero_checkpoint(folders[0])
            assert all(np.allclose(found[name].detach().numpy(), at_save[name], atol=1e-7) for name in found)
        torch.distributed.barrier()
        if rank() == 0:
            shutil.rmtree(folders[0])


def default_sketch() -> None:
    """At stage 3 a rule on Gram matrices decides by a sketch, unless the block says otherwise."""
    for block, sketch in (
        (GAF, 65536),
        ({**GAF, **EXACT}, None),
        ({**GAF, "gram": {"sketch": 64}}, 64),
        ({**GAF, **VRGD}, None),
    ):
        engine = build(stage3(block))
        assert engine.optimizer.gradmix.config.sketch_size == sketch
    assert build(Case(GAF, stage=2)).optimizer.gradmix.config.sketch_size is None


def loss_scaling() -> None:
    """An overflow in fp16 is skipped and lowers the loss scale; a step without agreement leaves it."""
    fp16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 100, "hysteresis": 1}

    def steps(block: dict[str, Any], power: int, number: int) -> Any:
        engine = build(stage3(block, config={"fp16": {**fp16, "initial_scale_power": power}}))
        random = torch.Generator().manual_seed(rank())
        for _ in range(number):
            out = engine(torch.randn(4, 13, generator=random).half())
            engine.backward((out.float() - torch.randn(4, 3, generator=random)).square().mean())
            engine.step()
        return engine

    begun = weights_of(build(stage3(GUARD, config={"fp16": fp16})))
    engine = steps({**VRGD, **TINY}, 24, 12)
    assert 0 < engine.skipped_steps < 12
    assert float(engine.optimizer.loss_scale) == 2.0 ** (24 - engine.skipped_steps)
    assert not equal(weights_of(engine), begun) and np.isfinite(weights_of(engine)["scale"]).all()
    engine = steps({"mixing": {"type": "GAF", "params": {"threshold": 0.0}}, **EXACT}, 4, 3)
    assert engine.skipped_steps == 3 and float(engine.optimizer.loss_scale) == 16.0
    assert equal(weights_of(engine), begun)


def not_finite() -> None:
    """A worker with a NaN is left out, or the step is."""
    for block in (
        {**GUARD, "nonfinite": "drop"},
        {**VRGD, **TINY, "nonfinite": "drop"},
        {"nonfinite": "drop"},
    ):
        case = stage3(block, steps=3, nan_at=(1, 1))
        told = train(build(case), case)
        assert all(np.isfinite(w).all() for w in told["weights"].values()), block
        assert told["skipped"] == [0, 0, 0] and told["stats"][1]["dropped_workers"] > 0
    case = stage3({**VRGD, **TINY}, steps=3, nan_at=(1, 1))
    told = train(build(case), case)
    assert told["skipped"] == [0, 1, 1]


def checkpointed() -> None:
    """Activation checkpointing by both ways, and leaf modules, train as without."""
    first, *others = by_every_way(stage3({**SMOOTH, **TINY}, steps=4, accumulation=2, zero=IN_PARTS))
    for other in others:
        assert relative(other, first) < 1e-6


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (unused, discarded, resumed, default_sketch, loss_scaling, not_finite, checkpointed)
}


@cache
def checked() -> list[dict[str, str | None]]:
    return run_ranks(2, failures, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str) -> None:
    for failed in checked():
        assert failed[name] is None, failed[name]
