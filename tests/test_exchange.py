"""The exchange over 2 and 4 ranks gives every owner what `combine` gives on the stack of all gradients."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_ranks
from solo import spans_of

from ds_gradmix import combine
from ds_gradmix.config import parse_block
from ds_gradmix.layout import Piece
from ds_gradmix.reduction import Reduction, parameters_of
from ds_gradmix.steps import Steps
from ds_gradmix.transit import Wire
from ds_gradmix.workers import Workers

GAF = {"mixing": {"type": "GAF", "params": {"threshold": 0.97}}}
VRGD = {"scaling": {"type": "VRGD"}}
BLOCKS: dict[str, dict[str, Any]] = {
    "gaf": GAF,
    "gaf by parameter": {**GAF, "scope": "parameter"},
    "vrgd": VRGD,
    "gaf vrgd": {**GAF, **VRGD},
    "gaf vrgd by parameter": {**GAF, **VRGD, "scope": "parameter"},
    "gradientmix vrgd": {"mixing": {"type": "GradientMix"}, **VRGD},
    "gradientmix by parameter vrgd": {
        "mixing": {"type": "GradientMix", "params": {"granularity": "parameter"}},
        **VRGD,
    },
    "vrgd momentum": {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}},
    "gaf drop": {**GAF, "nonfinite": "drop"},
}
BUCKETS = {  # lengths of parameters, and how many owners share them evenly; 1 is one owner, 0 is at random
    "one owner": ([5, 700, 64, 1, 2000], 1),
    "even": ([5, 700, 64, 1, 2001], 4),
    "random owners": ([300, 20, 5, 999, 31, 77, 1], 0),
    "one parameter": ([1234], 0),
    "fewer elements than workers": ([1, 1], 0),
    "nothing": ([], 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pieces_of(name: str, workers: int) -> list[Piece]:
    lengths, spread = BUCKETS[name]
    rng = random.Random(name)
    total, start, out, homes = sum(lengths), 0, [], [0] * workers
    for parameter, length in enumerate(lengths):
        done = 0
        while done < length:
            if spread == 0:
                owner, part = rng.randrange(workers), min(rng.randint(1, 400), length - done)
            else:
                size = -(-total // min(spread, workers)) if spread > 1 else total
                owner = workers - 1 - start // size  # reverse, as backward fills buckets
                part = min(length - done, size - start % size)
            out.append(Piece(start, part, owner, parameter, 0, homes[owner]))
            homes[owner] += part
            start, done = start + part, done + part
    return out


def gradients(name: str, workers: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    total = sum(BUCKETS[name][0])
    stack = 0.3 * torch.randn(total, generator=generator) + torch.randn(workers, total, generator=generator)
    return (stack * 3e-3).to(dtype)


def exchange_everything(workers_count: int) -> dict[Any, Any]:
    """On a rank: what it gets for the slices it owns."""
    workers = Workers(None)
    out: dict[Any, Any] = {}
    for block_name, block in BLOCKS.items():
        for name, (lengths, _) in BUCKETS.items():
            for dtype_name, dtype in DTYPES.items():
                for tile_bytes in (4096, 2**25):
                    rules = parse_block({**block, "tile_bytes": tile_bytes})
                    parameters = [f"p{i}" for i in range(len(lengths))]
                    device = torch.device("cpu")
                    steps = Steps(rules, workers, workers, [sum(lengths)], device)
                    steps.step = 3
                    reduction = Reduction(rules, workers, steps, parameters_of(parameters), device)
                    flat = gradients(name, workers_count, dtype)[workers.rank].clone()
                    if rules.nonfinite == "drop" and workers.rank == 1 and flat.numel():
                        flat[0] = float("inf")
                    pieces = pieces_of(name, workers_count)
                    spans = spans_of(lengths)
                    reduction.exchange(flat, spans, lambda pieces=pieces: pieces, Wire(dtype, dtype))
                    skip = steps.finish()
                    mine = [p for p in pieces if p.owner == workers.rank]
                    values = {p.start: flat[p.start : p.start + p.length] for p in mine}
                    out[block_name, name, dtype_name, tile_bytes] = values, skip, dict(steps.numbers)
    return out


@cache
def exchanged(workers: int) -> list[dict[Any, Any]]:
    return run_ranks(workers, exchange_everything, workers)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("block", BLOCKS)
def test_exchange_equals_combine(workers: int, block: str, bucket: str, dtype: str) -> None:
    stack = gradients(bucket, workers, DTYPES[dtype])
    if "drop" in block and stack.numel():
        stack[1, 0] = float("inf")
    sizes = BUCKETS[bucket][0]
    expected, info = combine(stack.float(), BLOCKS[block], step=3, sizes=sizes)
    # float32: sums in another order; else one rounding of the result, or of mean, factor and product
    eps = {"fp32": 3e-5, "bf16": 2**-8, "fp16": 2**-10}[dtype] * (3 if "momentum" in block else 1)
    for tile_bytes in (4096, 2**25):
        seen = 0
        for rank in exchanged(workers):
            values, skip, numbers = rank[block, bucket, dtype, tile_bytes]
            for start, part in values.items():
                wanted = expected[start : start + part.numel()]
                torch.testing.assert_close(
                    part.float(), wanted, rtol=eps, atol=1e-8 if dtype != "fp16" else 1e-7
                )
                seen += part.numel()
            if stack.numel():
                assert skip == info["skipped"]
                assert numbers["dropped_workers"] == ("drop" in block)
                kept = (info["weights"].reshape(-1, workers) != 0).double().mean(1)
                share = torch.tensor(sizes if len(kept) > 1 else [1.0]).double()
                assert abs(numbers["kept_fraction"] - float((kept * share).sum() / share.sum())) < 1e-9
        assert seen == stack.shape[1]
