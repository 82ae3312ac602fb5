"""The reduction path: no waiting for the device, and at most three tiles of memory, whatever the bucket."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ds_gradmix.exchange.exchange import GramShare
from ds_gradmix.rules import RngKey
from tests.support.solo import (
    BLOCKS,
    OWNERS,
    NoSynchronisation,
    PeakMemory,
    SoloWorkers,
    bucket_of,
    reduce_bucket,
    reducer_of,
    share_bucket,
    spans_of,
)

EVERY_RANK = "every rank"  # nobody owns the bucket, and all need the result


def reduce_as(
    owners: str,
    block: dict[str, Any],
    lengths: list[int],
    flat: torch.Tensor,
    ranks: int,
    around: Any,
    per_worker: int = 1,
) -> None:
    if owners == EVERY_RANK:
        share_bucket(block, lengths, flat, ranks, around, per_worker)
        return
    owning = [owner % ranks for owner in OWNERS[owners]]
    reduce_bucket(block, lengths, owning, flat, ranks, around=around, per_worker=per_worker)


@pytest.mark.parametrize("owners", [*OWNERS, EVERY_RANK])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("per_worker", [1, 2])
def test_the_host_never_waits(name: str, owners: str, per_worker: int) -> None:
    block = {**BLOCKS[name], "tile_bytes": 8192}
    reduce_as(owners, block, [200] * 8, torch.randn(1600), 4, NoSynchronisation(), per_worker)


GUARD: dict[str, Any] = {"mixing": {"type": "Guard"}}
RARELY: dict[str, Any] = {"telemetry": {"every": 1000, "per_parameter": True}}
WATCHED: dict[str, dict[str, Any]] = {
    "guard": GUARD,
    "guard by parameter": {**GUARD, "scope": "parameter"},
    "guard exact": {**GUARD, "gram": "exact"},
    "guard by exchange": {**GUARD, "transport": "exchange"},
    "guard vrgd": {**GUARD, "scaling": {"type": "VRGD"}},
    "norm clip": {"mixing": {"type": "NormClip"}},
    "mean watched": RARELY,
    "guard watched": {**GUARD, **RARELY},
    "vrgd watched": {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}, **RARELY},
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("per_worker", [1, 2])
def test_the_host_does_not_wait_in_a_step_that_is_not_read(name: str, per_worker: int) -> None:
    """From the first bucket to what is observed after the optimizer's step, by its first rank."""
    workers, lengths = SoloWorkers(4, per_worker), [200] * 8
    block = {"telemetry": {"every": 1000}, **WATCHED[name], "tile_bytes": 8192}
    reducer = reducer_of(block, workers, len(lengths), 400)
    bucket = bucket_of(torch.randn(1600), spans_of(lengths), workers, None)
    for step in range(2):  # the first one plans and allocates
        with NoSynchronisation() if step else contextlib.nullcontext():
            reducer.reduce(bucket, RngKey(1, step), last=True)
            reducer.end_backward(last=True, gradient_scale=1.0)
            assert not reducer.pre_step(step)
            assert reducer.post_step(taken=True, step=step, batch=8) is None
    with pytest.raises(AssertionError, match="tolist makes"), NoSynchronisation():
        reducer.reduce(bucket, RngKey(1, 999), last=True)
        reducer.end_backward(last=True, gradient_scale=1.0)
        reducer.pre_step(999)
        reducer.post_step(taken=True, step=999, batch=8)


def test_waiting_is_noticed() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronisation():
        torch.ones(2).sum().item()


TILE = 2**16


@pytest.mark.parametrize("owners", [*OWNERS, EVERY_RANK])
@pytest.mark.parametrize(
    "ranks, per_worker, dtype",
    [
        (2, 1, torch.bfloat16),
        (4, 1, torch.float32),
        (8, 1, torch.bfloat16),
        (4, 2, torch.float32),
        (8, 4, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", BLOCKS)
def test_memory_is_bounded(name: str, ranks: int, per_worker: int, dtype: torch.dtype, owners: str) -> None:
    block = {**BLOCKS[name], "tile_bytes": TILE}
    lengths = [500, 90_000, 7, 12_000, 18_000, 12_000, 3000, 4000]
    with torch.no_grad():
        flat = torch.randn(sum(lengths)).to(dtype)
        watch = PeakMemory()
        reduce_as(owners, block, lengths, flat, ranks, watch, per_worker)
    small = 32 * 1024  # W^2 and P numbers, and padding of a tile to whole blocks
    assert watch.peak_bytes <= 3 * TILE + small, watch.peak_bytes / TILE
    if "gradientmix" not in name or "vrgd" in name:
        least = TILE / 4 if "sketch" in name or "summed" in name else TILE / 2
        assert watch.peak_bytes > least  # it did see something


def test_what_waits_for_a_decision_keeps_one_tile() -> None:
    """And nothing is kept of what is combined."""
    workers, flat = SoloWorkers(4), torch.randn(100_000)
    reducer = reducer_of({**BLOCKS["gaf"], "tile_bytes": TILE}, workers, 1, 0)
    exchange = reducer.watch.exchange
    pending = exchange.send(bucket_of(flat, spans_of([len(flat)]), workers, None))
    gram = GramShare(pending.gram())
    pending.tiled.suspend()
    assert held_bytes(pending.tiled) <= 1.5 * TILE
    present_W = torch.ones(4, dtype=torch.bool)
    pending.combine(exchange.decide(gram, present_W, RngKey(1, 0), workers))
    assert held_bytes(pending.tiled) == 0


def held_bytes(tiled: Any) -> int:
    held = [value for value in vars(tiled).values() if value is not None]
    return sum(tensor.nbytes for tensor in tree_leaves(held) if isinstance(tensor, torch.Tensor))


def test_memory_is_noticed() -> None:
    with PeakMemory() as watch:
        kept = torch.empty(1000)
        for _ in range(5):
            torch.empty(500)
        del kept
    assert 4 * 1000 <= watch.peak_bytes <= 4 * 2000
