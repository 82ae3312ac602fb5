"""Noise under ZeRO-3: training sees theta + delta, in forward and backward, and everything else theta."""

from __future__ import annotations

import functools
import shutil
import tempfile
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
    by_every_way,
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


def rank() -> int:
    return torch.distributed.get_rank()


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
                loss = loss_of(engine, step, micro, rank(), case)
                look(engine, plain, at)
                engine.backward(loss)
                look(engine, plain, at)
                engine.step()
        assert equal(weights_of(engine), expected), zero


def checkpointed() -> None:
    """Activation checkpointing by both ways, and leaf modules, train as without."""
    first, *others = by_every_way(stage3(NOISE, steps=4, accumulation=2, zero=IN_PARTS))
    for other in others:
        assert relative(other, first) < 1e-6


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
        engine.backward(loss_of(engine, 0, 0, rank(), case))
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


class Layers(torch.nn.Module):
    """Three layers, of which the second's weights are noted; the first may be frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(13, 13).requires_grad_(not frozen)
        self.noting = Noting(13, 13, bias=False)
        self.last = torch.nn.Linear(13, 3)
        self.calls_itself = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.calls_itself:
            self.calls_itself = False
            with torch.no_grad():
                self(x)
            Product.seen.clear()
        return self.last(torch.tanh(self.noting(hidden)))


def inputs() -> torch.Tensor:
    return torch.randn(4, 13, generator=torch.Generator().manual_seed(rank()))


def offsets(engine: Any, train_once: Callable[[], None]) -> list[float]:
    """How far what forward and backward saw was from the weights before."""
    theta = torch.from_numpy(weights_of(engine)["noting.weight"])
    Product.seen.clear()
    train_once()
    found = [float((seen - theta).std()) for seen in Product.seen]
    assert len(found) == 2 and found[0] == found[1], found
    return found


def steps_of(engine: Any, number: int = 1) -> None:
    for _ in range(number):
        engine.backward(engine(inputs()).square().mean())
        engine.step()


def frozen_before_others() -> None:
    """What is asked of a list of parameters is asked of its first."""
    for zero in (IN_PARTS, ALL_PERSISTENT):
        engine = build(stage3(NOISE, zero=zero), Layers(frozen=True))
        for _ in range(2):
            assert offsets(engine, functools.partial(steps_of, engine))[0] > 0.05
        before = weights_of(engine)
        loss = engine(inputs()).square().mean()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            pass
        assert equal(weights_of(engine), before)
        theta = torch.from_numpy(before["noting.weight"])
        Product.seen.clear()
        engine.backward(loss)
        assert float((Product.seen[0] - theta).std()) > 0.05


def backwards_of_what_was_not_training() -> None:
    """Of an evaluation, of a model that is trained in evaluation mode, and of layers by themselves."""
    for stage in (2, 3):
        engine = build(Case(NOISE, stage=stage), Layers())

        def saliency() -> None:
            x = inputs().requires_grad_()
            torch.autograd.grad(engine(x).sum(), x)  # noqa: B023

        def by_layers() -> None:
            engine.backward(engine.module.noting(engine.module.first(inputs())).sum())  # noqa: B023

        step = functools.partial(steps_of, engine)
        step()
        engine.eval()
        assert stage == 2 or offsets(engine, saliency) == [0, 0]
        assert offsets(engine, step) == [0, 0]
        engine.train()
        assert offsets(engine, step)[0] > 0.05
        assert offsets(engine, by_layers) == [0, 0]


def in_its_own_forward() -> None:
    """A model that calls itself without gradients is in training still."""
    for zero in ({}, IN_PARTS):
        engine = build(stage3(NOISE, zero=zero), Layers())
        for _ in range(2):
            engine.module.calls_itself = True
            assert offsets(engine, functools.partial(steps_of, engine))[0] > 0.05


def without_the_engines_backward() -> None:
    engine = build(stage3(NOISE), Layers())
    for _ in range(2):
        assert offsets(engine, lambda: engine(inputs()).sum().backward())[0] > 0.05
        engine.step()


def after_a_backward() -> None:
    """Layers whose input needs no gradient are released last."""
    engine = build(stage3(NOISE), Layers())
    steps_of(engine, 2)
    theta = weights_of(engine)
    engine.backward(engine(inputs()).square().mean())
    for name, p in engine.module.named_parameters():
        np.testing.assert_array_equal(p.detach().double().numpy(), theta[name])


def in_another_engine() -> None:
    """A module's next engine has its own rules, forward and backward."""
    module, last = Layers(), None
    for block in ({}, NOISE, {}):
        if last is not None:
            last.destroy()
        last = build(stage3(block, zero=IN_PARTS), module)
        found = offsets(last, functools.partial(steps_of, last))
        assert (found[0] > 0.05) == bool(block)


class Attention(torch.nn.Module):
    """Uses the parameters of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(13, 12)
        self.attention = torch.nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)[None]
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


def resumed() -> None:
    """Bit for bit, also where a parameter is used by another module than its own."""
    folders = [tempfile.mkdtemp() if rank() == 0 else ""]
    torch.distributed.broadcast_object_list(folders)
    engine = build(stage3(NOISE), Attention())
    steps_of(engine, 3)
    engine.save_checkpoint(folders[0])
    steps_of(engine, 3)
    again = build(stage3(NOISE), Attention())
    again.load_checkpoint(folders[0])
    steps_of(again, 3)
    assert equal(weights_of(again), weights_of(engine))
    torch.distributed.barrier()
    if rank() == 0:
        shutil.rmtree(folders[0])


def after_an_exception() -> None:
    """What a forward still held that raised one cannot be gathered, or the offset would be written."""
    engine = build(stage3(NOISE, zero=IN_PARTS), Layers())
    steps_of(engine, 2)
    before = weights_of(engine)
    with pytest.raises(RuntimeError, match="shape"):
        engine(torch.ones(2, 5))
    gathered = deepspeed.zero.GatheredParameters([engine.module.first.weight], modifier_rank=0)
    with pytest.raises(RuntimeError, match=r"first.weight.*cannot be gathered"), gathered:
        pass
    engine.eval()
    with torch.no_grad():
        engine(inputs())
    assert equal(weights_of(engine), before)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        looked_at,
        checkpointed,
        in_bfloat16,
        frozen_before_others,
        backwards_of_what_was_not_training,
        in_its_own_forward,
        without_the_engines_backward,
        after_a_backward,
        in_another_engine,
        resumed,
        after_an_exception,
    )
}


@cache
def checked() -> list[dict[str, str | None]]:
    return run_ranks(2, failures, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str) -> None:
    for failed in checked():
        assert failed[name] is None, failed[name]
