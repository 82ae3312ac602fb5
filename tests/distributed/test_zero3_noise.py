"""Noise under ZeRO-3: training sees theta + delta, in forward and backward, and everything else theta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import deepspeed
import numpy as np
import pytest
import torch

from tests.support.blocks import TINY, VRGD, noise
from tests.support.models import Regression
from tests.support.ranks import failures, run_ranks
from tests.support.replay import replay
from tests.support.training import Case, build, equal, loss_of, relative, run_cases, train, weights_of
from tests.support.zero3 import (
    ALL_PERSISTENT,
    EXACT,
    GAF,
    IN_PARTS,
    OFFLOAD,
    SMALL,
    Inner,
    Outer,
    stage3,
)

NOISE = noise(std=0.1)
CASES: dict[str, Case] = {
    "in parts": stage3(NOISE, zero=IN_PARTS, accumulation=2),
    "persistent": stage3(NOISE, zero=ALL_PERSISTENT, accumulation=2),
    "some persistent": stage3(NOISE, zero={"stage3_param_persistence_threshold": 100}),
    "by tensor": stage3(noise(std_ratio=0.3, distribution="uniform"), zero=IN_PARTS),
    "two groups, vrgd": stage3({**NOISE, **VRGD, **TINY}, two_groups=True, bucket=SMALL),
    "gaf": stage3({**NOISE, **GAF, **EXACT, "telemetry": True}, accumulation=2, bucket=SMALL),
    "offload": stage3(NOISE, zero={**OFFLOAD, **IN_PARTS}),
    "released late": stage3(NOISE, zero={**IN_PARTS, "stage3_max_reuse_distance": 10**9}),
    "released early": stage3(NOISE, zero={**IN_PARTS, "stage3_max_reuse_distance": 0}),
}


@cache
def runs(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, run_cases, CASES)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_replay(name: str, world: int) -> None:
    ranks = [found[name] for found in runs(world)]
    buckets = ranks[0]["buckets"]
    expected = replay(CASES[name], world, buckets)
    without = replay(replace(CASES[name], block={**CASES[name].block, "extrapolation": {}}), world, buckets)
    for found in ranks:
        assert relative(found["weights"], expected["weights"]) < 1e-5
        assert relative(found["weights"], without["weights"]) > 1e-3


def look(engine: Any, plain: Any, at: dict[str, Any]) -> None:
    """An engine shows these weights, and computes with them what one without noise does."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for name, p in engine.module.named_parameters():
            np.testing.assert_array_equal(p.detach().numpy(), at[name])
    with deepspeed.zero.GatheredParameters(list(plain.module.parameters()), modifier_rank=0):
        for name, p in plain.module.named_parameters():
            p.data.copy_(torch.from_numpy(at[name]))
    x = torch.ones(2, 13)
    for training, grad in ((False, True), (True, False), (False, False)):
        engine.module.train(training)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(engine(x), plain(x))
        engine.module.train()


def looked_at() -> None:
    """Evaluations and whole parameters are of theta at any time, also after a forward that breaks off; and
    the training is the same as if nobody had looked.
    """
    for zero in (IN_PARTS, ALL_PERSISTENT, {}):
        case = stage3(NOISE, zero=zero, accumulation=2)
        expected = train(build(case), case)["weights"]
        engine, plain = build(case), build(stage3({}, zero=zero, accumulation=2))
        for step in range(case.steps):
            at = {name: w.astype(np.float32) for name, w in weights_of(engine).items()}
            for micro in range(2):
                look(engine, plain, at)
                with pytest.raises(RuntimeError, match="shape"):
                    engine(torch.ones(2, 5))
                if micro == 0:
                    engine.module.eval()
                    torch.testing.assert_close(engine(torch.ones(2, 13)), plain(torch.ones(2, 13)))
                    engine.module.train()
                loss = loss_of(engine, step, micro, torch.distributed.get_rank(), case)
                look(engine, plain, at)
                engine.backward(loss)
                look(engine, plain, at)
                engine.step()
        assert equal(weights_of(engine), expected), zero


def checkpointed() -> None:
    """Activation checkpointing by both ways, and leaf modules, train as without."""
    found = []
    case = stage3(NOISE, steps=4, accumulation=2, zero=IN_PARTS)
    for reentrant, leaf in ((None, False), (False, False), (True, False), (None, True)):
        model = Outer(reentrant)
        if leaf:
            deepspeed.utils.set_z3_leaf_modules(model, [Inner])
        engine = build(case, model)
        train(engine, case)
        found.append(weights_of(engine))
    for other in found[1:]:
        assert relative(other, found[0]) < 1e-6


class Product(torch.autograd.Function):
    """A matrix product that notes the weights it sees, forward and backward."""

    seen: ClassVar[list[torch.Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        Product.seen.append(weight.detach().double().clone())
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        Product.seen.append(weight.detach().double().clone())
        return grads[0] @ weight, grads[0].T @ x


class Noting(torch.nn.Linear):
    """A layer whose weights are noted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self.weight)


def in_bfloat16() -> None:
    """Each rank's own noise, in forward and again in backward, however small by rounding."""
    for std, zero in ((0.1, IN_PARTS), (1e-4, ALL_PERSISTENT)):
        case = stage3({**noise(std=std), "telemetry": True}, dtype="bf16", zero=zero)
        model = Regression(empty=False)
        model.first = Noting(13, 31)
        engine = build(case, model)
        theta = weights_of(engine)["first.weight"]
        engine.backward(loss_of(engine, 0, 0, torch.distributed.get_rank(), case))
        forward, backward = Product.seen
        Product.seen.clear()
        assert torch.equal(forward, backward)
        offset = forward - torch.from_numpy(theta)
        assert float(offset.std()) == pytest.approx(std, rel=0.2 if std > 0.01 else 9)
        assert abs(float(offset.mean())) < 4 * float(offset.std()) / offset.numel() ** 0.5
        others = [torch.zeros_like(offset) for _ in range(2)]
        torch.distributed.all_gather(others, offset)
        assert not torch.equal(*others)
        engine.step()


CHECKS: dict[str, Callable[[], None]] = {c.__name__: c for c in (looked_at, checkpointed, in_bfloat16)}


@cache
def checked() -> list[dict[str, str | None]]:
    return run_ranks(2, failures, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str) -> None:
    for failed in checked():
        assert failed[name] is None, failed[name]
