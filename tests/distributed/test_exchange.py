"""The exchange over 2 and 4 ranks gives every owner, or every rank, what `combine` gives on the stack of all
workers' gradients, which are those of ranks or the means over two of them.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from ds_gradmix import combine
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.engines.worker_size import find_levels
from ds_gradmix.exchange.bucket import ParamSpan
from ds_gradmix.exchange.plan import Piece
from ds_gradmix.rules import RngKey
from tests.support.outside_rules import MODULE
from tests.support.ranks import run_ranks
from tests.support.solo import bucket_of, reducer_of, spans_of

GAF = {"mixing": {"type": "GAF", "params": {"threshold": 0.97}}}
VRGD = {"scaling": {"type": "VRGD"}}
SCALE = 3e-3  # of gradients
SKETCH = {"gram": {"sketch": 96}}
SUMMED = {"transport": "exchange"}
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
    "gaf andmask": {**GAF, "scaling": {"type": "AndMask"}},
    "gaf sketch by parameter": {**GAF, **SKETCH, **SUMMED, "scope": "parameter"},
    "gaf sketch drop": {**GAF, **SKETCH, **SUMMED, "nonfinite": "drop"},
    "trust sketch": {"mixing": {"type": f"{MODULE}:Trust"}, **SKETCH, **SUMMED},
    "mean summed": SUMMED,
    "gradientmix by parameter summed": {
        "mixing": {"type": "GradientMix", "params": {"granularity": "parameter"}},
        **SUMMED,
    },
    "trust spread": {"mixing": {"type": f"{MODULE}:Trust"}, "scaling": {"type": f"{MODULE}:Spread"}},
}
BUCKETS = {  # lengths of parameters, and how many owners share them evenly; 1 is one owner, 0 is at random
    "one owner": ([5, 700, 64, 1, 2000], 1),
    "even": ([5, 700, 64, 1, 2001], 4),
    "random owners": ([300, 20, 5, 999, 31, 77, 1], 0),
    "one parameter": ([1234], 0),
    "fewer elements than workers": ([1, 1], 0),
    "an uneven rest": ([900, 13, 800, 52], 0),
    "nothing": ([], 1),
}
# Many tiles; and one tile, where how many there are does not hang on the dtype.
TILES = {"fp32": (4096, 2**25), "bf16": (4096,), "fp16": (4096,)}
# Ranks, and how many make a worker and a node.
CREWS = {"2 ranks": (2, 1, 1), "4 ranks": (4, 1, 1), "2 pairs": (4, 2, 2), "2 nodes": (4, 1, 2)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUNS = [
    (crew, dtype) for crew, dtype in product(CREWS, DTYPES) if crew[2:] in ("ranks", "") or dtype != "fp16"
]


CASES = [  # nodes matter only where an exchange sums by what is decided before; for that two dtypes will do
    ((crew, dtype), block)
    for (crew, dtype), block in product(RUNS, BLOCKS)
    if ("transport" in BLOCKS[block] and dtype != "fp16")
    or ("transport" not in BLOCKS[block] and crew != "2 nodes")
]


def pieces_of(name: str, workers: int) -> list[Piece]:
    lengths, spread = BUCKETS[name]
    rng = random.Random(name)
    total, start, out, offsets = sum(lengths), 0, [], [0] * workers
    for parameter, length in enumerate(lengths):
        done = 0
        while done < length:
            if spread == 0:
                owner, part = rng.randrange(workers), min(rng.randint(1, 400), length - done)
            else:
                size = -(-total // min(spread, workers)) if spread > 1 else total
                owner = workers - 1 - start // size  # reverse, as backward fills buckets
                part = min(length - done, size - start % size)
            out.append(Piece(start, part, owner, parameter, 0, offsets[owner]))
            offsets[owner] += part
            start, done = start + part, done + part
    return out


def gradients(name: str, workers: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    total = sum(BUCKETS[name][0])
    stack = 0.3 * torch.randn(total, generator=generator) + torch.randn(workers, total, generator=generator)
    return (stack * SCALE).to(dtype)


def spans_around(lengths: list[int], left_out: int | None) -> tuple[ParamSpan, ...]:
    """Gradients of a bucket, but for one, whose place stays a gap between the others."""
    kept = [span for span in spans_of(lengths) if span.param != left_out]
    return tuple(span._replace(param=i) for i, span in enumerate(kept))


def exchange_one(
    workers: WorkerGroup,
    block: dict[str, Any],
    flat_N: torch.Tensor,
    spans: tuple[ParamSpan, ...],
    pieces: list[Piece] | None,
) -> tuple[bool, dict[str, float]]:
    reducer = reducer_of(block, workers, len(spans), flat_N.numel())
    reducer.reduce(bucket_of(flat_N, spans, workers, pieces), RngKey(reducer.config.seed, 3), last=True)
    return reducer.pre_step(3), dict(reducer.stats)


def exchange_everything(crew: str) -> dict[Any, Any]:
    """On a rank: what it gets for the slices it owns; and the whole bucket, if every rank is to get it."""
    rank, (num_ranks, ranks_per_worker, ranks_per_node) = torch.distributed.get_rank(), CREWS[crew]
    dtypes = [dtype for own, dtype in RUNS if own == crew]
    world = torch.distributed.group.WORLD
    nodes = find_levels(world, ranks_per_node, 1)
    nodes = nodes._replace(num_replicas=1) if nodes else None
    workers = WorkerGroup(None, find_levels(world, ranks_per_worker, 1), node_levels=nodes)
    out: dict[Any, Any] = {}
    tiles = [(dtype, size) for dtype in dtypes for size in TILES[dtype]]
    for block_name, name, (dtype_name, tile_bytes) in product(BLOCKS, BUCKETS, tiles):
        if ((crew, dtype_name), block_name) not in CASES:
            continue
        block, lengths = {**BLOCKS[block_name], "tile_bytes": tile_bytes}, BUCKETS[name][0]
        own = gradients(name, num_ranks, DTYPES[dtype_name])[rank]
        if block.get("nonfinite") == "drop" and rank == 1 and own.numel():
            own[0] = float("inf")
        key = (block_name, name, dtype_name, tile_bytes)
        pieces, flat = pieces_of(name, num_ranks), own.clone()
        told = exchange_one(workers, block, flat, spans_of(lengths), pieces)
        values = {p.start: flat[p.start : p.start + p.length] for p in pieces if p.owner == rank}
        out[key] = values, *told
        for left_out in gaps_of(name, tile_bytes):
            spans, flat = spans_around(lengths, left_out), own.clone()
            told = exchange_one(workers, block, flat, spans, None)
            out[(*key, left_out)] = flat, *told
    return out


def gaps_of(bucket: str, tile_bytes: int) -> list[int | None]:
    """Which parameter to leave out: none, and where there are many tiles one in the middle of the bucket."""
    middle = len(BUCKETS[bucket][0]) // 2
    return [None, middle] if middle > 1 and tile_bytes == 4096 else [None]


@cache
def exchanged(crew: str) -> list[dict[Any, Any]]:
    return run_ranks(CREWS[crew][0], exchange_everything, crew)


def stack_of(block: str, bucket: str, crew: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all ranks, and of all workers: means in float32, rounded to what travels between workers."""
    num_ranks, ranks_per_worker, _ = CREWS[crew]
    stack = gradients(bucket, num_ranks, DTYPES[dtype])
    if "drop" in block and stack.numel():
        stack[1, 0] = float("inf")
    means = stack.float().view(num_ranks // ranks_per_worker, ranks_per_worker, -1).mean(1)
    return stack, means.to(stack.dtype).float()


def assert_close(found: torch.Tensor, wanted: torch.Tensor, block: str, dtype: str) -> None:
    # float32: sums in another order; else one rounding of the result, or of mean, factor and product
    eps = {"fp32": 3e-5, "bf16": 2**-8, "fp16": 2**-10}[dtype] * (3 if "momentum" in block else 1)
    if BLOCKS[block].get("transport") and dtype != "fp32":  # what travels is weighted, and rounded
        torch.testing.assert_close(
            found.float(), wanted, rtol=eps, atol=4 * eps * SCALE
        )  # up to three roundings of gradients up to 4 SCALE
        return
    torch.testing.assert_close(found.float(), wanted, rtol=eps, atol=1e-8 if dtype != "fp16" else 1e-7)


def assert_told(told: Any, info: Any, sizes: list[int], workers: int, dropped: bool) -> None:
    skip, numbers = told
    assert skip == info["skipped"]
    assert numbers["dropped_workers"] == dropped
    kept = (info["weights"].reshape(-1, workers) != 0).double().mean(1)
    share = torch.tensor(sizes if len(kept) > 1 else [1.0]).double()
    assert abs(numbers["kept_fraction"] - float((kept * share).sum() / share.sum())) < 1e-9


@pytest.mark.parametrize("crew, dtype, block", [(*run, block) for run, block in CASES])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_exchange_equals_combine(crew: str, block: str, bucket: str, dtype: str) -> None:
    (stack, means), sizes = stack_of(block, bucket, crew, dtype), BUCKETS[bucket][0]
    expected, info = combine(means, BLOCKS[block], step=3, sizes=sizes)
    for tile_bytes in TILES[dtype]:
        seen = 0
        for rank in exchanged(crew):
            values, *told = rank[block, bucket, dtype, tile_bytes]
            for start, part in values.items():
                assert_close(part, expected[start : start + part.numel()], block, dtype)
                seen += part.numel()
            if stack.numel():
                assert_told(told, info, sizes, len(means), "drop" in block)
        assert seen == stack.shape[1]


@pytest.mark.parametrize("crew, dtype, block", [(*run, block) for run, block in CASES])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_whole_results_are_alike(crew: str, block: str, bucket: str, dtype: str) -> None:
    """Where every rank needs all of the result; and what is not part of the exchange is not touched."""
    (stack, means), lengths = stack_of(block, bucket, crew, dtype), BUCKETS[bucket][0]
    for tile_bytes, left_out in [(size, gap) for size in TILES[dtype] for gap in gaps_of(bucket, size)]:
        kept = torch.ones(stack.shape[1], dtype=torch.bool)
        if left_out is not None:
            spans_of(lengths)[left_out].of(kept).zero_()
        sizes = [length for i, length in enumerate(lengths) if i != left_out]
        expected, info = combine(means[:, kept], BLOCKS[block], step=3, sizes=sizes)
        first = exchanged(crew)[0][block, bucket, dtype, tile_bytes, left_out][0][kept]
        for number, rank in enumerate(exchanged(crew)):
            flat, *told = rank[block, bucket, dtype, tile_bytes, left_out]
            assert torch.equal(flat[~kept], stack[number, ~kept])
            assert torch.equal(flat[kept], first)  # bit for bit: replicas must not drift apart
            assert_close(flat[kept], expected, block, dtype)
            if kept.any():
                assert_told(told, info, sizes, len(means), "drop" in block)
