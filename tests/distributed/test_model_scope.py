"""Scope "model" where every rank needs the whole result: gradients are sent once, and the result is as if
they had been sent for the decision and then anew.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch

from ds_gradmix.comm.workers import WorkerGroup
from tests.support.engines import ENGINES
from tests.support.models import Regression
from tests.support.ranks import run_ranks
from tests.support.training import LR, Case, build, ds_config, loss_of, weights_of

MODEL: dict[str, Any] = {
    "mixing": {"type": "GAF", "params": {"threshold": 0.9}},
    "scope": "model",
    "tile_bytes": 4096,
}
SMOOTH: dict[str, Any] = {"scaling": {"type": "VRGD", "params": {"gamma": 0.5, "momentum": 0.8}}}
AHEAD: dict[str, Any] = {"extrapolation": {"type": "PastGradient", "params": {"lr": 0.02}}}
BF16_OPTIMIZER = ENGINES["BF16_Optimizer"]
BUCKET = 500  # elements from which on DeepSpeed begins another bucket
CASES = {
    "ZeRO-0": Case(MODEL, stage=0, accumulation=2),
    "ZeRO-0, one tile": Case({**MODEL, "tile_bytes": 2**20}, stage=0),
    "ZeRO-0 with momentum": Case({**MODEL, **SMOOTH}, stage=0),
    "ZeRO-0 bf16": Case(MODEL, stage=0, dtype="bf16"),
    "BF16_Optimizer": Case(MODEL, **BF16_OPTIMIZER),
    "BF16_Optimizer, two groups": Case({**MODEL, **SMOOTH}, two_groups=True, **BF16_OPTIMIZER),
    "extrapolated": Case({**MODEL, **AHEAD}, stage=0),
    "drop": Case({**MODEL, **AHEAD, "nonfinite": "drop"}, stage=0, nan_at=(1, 1)),
    "skip": Case({**MODEL, "mixing": {"type": "GAF", "params": {"threshold": 0.0}}}, stage=0),
}
STEPS = 4


def train(case: Case, bucket: int, gathers: bool) -> dict[str, Any]:
    """Weights, what was told, and how many elements this rank gave to others in all-to-alls."""
    import ds_gradmix

    engine, rank, sent = build(case), torch.distributed.get_rank(), 0
    engine.allreduce_gradients = functools.partial(engine.allreduce_gradients, bucket_size=bucket)
    reducer = engine.optimizer.gradmix
    if not gathers:
        prepare = reducer.prepare
        reducer.prepare = lambda grads, dtypes, key, buckets: prepare(grads, dtypes, key)
    all_to_all = WorkerGroup.all_to_all

    def counting(
        workers: WorkerGroup, out: torch.Tensor, given: torch.Tensor, out_sizes: Any, sizes: list[int]
    ) -> None:
        nonlocal sent
        sent += sum(sizes) - sizes[workers.rank]
        all_to_all(workers, out, given, out_sizes, sizes)

    WorkerGroup.all_to_all = counting  # type: ignore[method-assign]
    told = []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            engine.backward(loss_of(engine, step, micro, rank, case))
            engine.step()
        told.append(dict(ds_gradmix.stats(engine)))
    WorkerGroup.all_to_all = all_to_all  # type: ignore[method-assign]
    return {"weights": weights_of(engine), "told": told, "sent": sent, "skipped": engine.skipped_steps}


def both_ways() -> dict[str, Any]:
    return {name: [train(case, BUCKET, gathers) for gathers in (True, False)] for name, case in CASES.items()}


@cache
def runs() -> list[dict[str, Any]]:
    return run_ranks(3, both_ways)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_sent_once(name: str) -> None:
    for rank in runs():
        gathered, anew = rank[name]
        np.testing.assert_equal(gathered["weights"], anew["weights"])  # bit for bit
        np.testing.assert_equal(gathered["weights"], runs()[0][name][0]["weights"])
        assert gathered["skipped"] == anew["skipped"]
        for ours, theirs in zip(gathered["told"], anew["told"], strict=True):
            # Inner products are summed in another order, in float32 first.
            assert ours == pytest.approx(theirs, rel=1e-6)
        assert 0 < gathered["sent"] <= 0.51 * anew["sent"]  # shares differ by an element
    if name == "skip":
        assert gathered["skipped"] == STEPS
    if name == "drop":
        assert [told["dropped_workers"] > 0 for told in gathered["told"]] == [False, True, False, False]


def outside() -> tuple[int, int]:
    """How often in two steps DeepSpeed averages what the optimizer does not have, and how much in all."""
    import ds_gradmix

    ds_gradmix.enable()
    case, model, averaged = Case(MODEL, stage=0), Regression(), []
    model.frozen.requires_grad_(True)
    known = [p for name, p in model.named_parameters() if "frozen" not in name]
    config = {key: value for key, value in ds_config(case).items() if key != "optimizer"}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(known, lr=LR), config=config)[0]
    all_reduce = deepspeed.comm.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        averaged.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    deepspeed.comm.all_reduce = counting
    for step in range(2):
        engine.backward(loss_of(engine, step, 0, torch.distributed.get_rank(), case))
        engine.step()
    deepspeed.comm.all_reduce = all_reduce
    frozen = sum(p.numel() for p in model.frozen.parameters())
    return averaged.count(frozen), sum(averaged) // frozen


def test_what_the_optimizer_does_not_have_is_averaged_once() -> None:
    assert run_ranks(2, outside) == [(2, 2)] * 2


def in_one_bucket() -> dict[str, Any]:
    scopes = {scope: Case({**MODEL, "scope": scope}, stage=0) for scope in ("bucket", "model")}
    return {scope: train(case, 10**8, True)["weights"] for scope, case in scopes.items()}


def test_one_bucket_is_the_model() -> None:
    for rank in run_ranks(2, in_one_bucket):
        np.testing.assert_equal(rank["model"], rank["bucket"])
