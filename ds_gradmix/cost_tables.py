"""What a block costs with a ds_config, in words and numbers: what `ds_gradmix check` prints, by costs.py's
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_gradmix.config import Block
from ds_gradmix.costs import (
    BUCKET,
    Cluster,
    Job,
    all_reduce,
    block_costs,
    exchanges,
    gradient_hops,
    stock_costs,
)
from ds_gradmix.engines.support import lookup
from ds_gradmix.exchange import columns_per_tile
from ds_gradmix.mixing import Mean

_SMALL_MESSAGE = 64 * 2**10  # bytes; with smaller ones a network is far from its bandwidth


def sent_ratio(block: Block, ranks: int, owners: str) -> float:
    """Bytes a rank sends for a bucket, as a multiple of what stock DeepSpeed's all-reduce sends.

    The size of workers does not matter: it decides how much of it leaves a node.
    """
    if ranks == 1:
        return 1.0
    cluster, job = Cluster(ranks), Job(1.0, 1, owners)  # type: ignore[arg-type]
    return sum(hop.sent for hop in gradient_hops(block, job, cluster)) / all_reduce(1.0, cluster).sent


def cost_table(config: Mapping[str, Any], block: Block, sizes: Sequence[int]) -> str:
    """The costs for several data-parallel sizes."""
    lines = ["gradients sent per rank and reduction, relative to stock DeepSpeed:"]
    kind = _engine_without_owners(config)
    if kind is not None:
        lines.append(f"    ranks  buckets of {kind}")
        lines += [f"  {size:7d}  {sent_ratio(block, size, 'all'):{11 + len(kind)}.3f}" for size in sizes]
    else:
        lines.append("    ranks  even buckets  one owner a bucket")
        for size in sizes:
            even, uneven = (sent_ratio(block, size, owners) for owners in ("even", "one"))
            lines.append(f"  {size:7d}  {even:12.3f}  {uneven:18.3f}")
    bucket, width = _bucket(config), _width(config)
    stock = f"stock: a copy of the bucket, at most {bucket * width / 2**20:g} MiB"
    if kind == "ZeRO-0":
        stock += " and a parameter"
    if kind == "BF16_Optimizer":
        stock = "stock: a copy in bf16 of all gradients of a parameter group"
    if block.mixing.needs_gram or block.scaling is not None:
        tiles = f"{3 * block.tile_bytes / 2**20:g} MiB, 3 tiles"
        tiles += " besides stock's" if kind == "ZeRO-0" else ""
        lines.append(f"extra memory per rank while a bucket is reduced: at most {tiles} ({stock})")
        if kind is not None and block.mixing.needs_gram and block.scope == "model":
            lines.append("  and 1.5 tiles for every bucket that waits for the decision on the model")
        if block.mixing.needs_gram:
            each = "every parameter of a bucket" if block.scope == "parameter" else "each decision"
            lines.append(f"  and W x W float64 for {each}")
    elif isinstance(block.mixing, Mean) and block.nonfinite == "propagate":
        lines.append(f"extra memory per rank: none, this is stock DeepSpeed ({stock})")
    else:
        tile = block.tile_bytes / 2**20
        lines.append(
            f"extra memory per rank while a bucket is reduced: at most {tile:g} MiB besides stock's ({stock})"
        )
    if block.scaling is not None and block.scaling.smoothing > 0:
        lines.append(
            "  and for momentum 4 bytes per parameter / ranks throughout, as much again during reductions"
        )
    if block.extrapolation is not None:
        lines.append(_extrapolation_line(config, block))
    if block.mixing.needs_gram and block.scope == "bucket":
        name = "reduce_bucket_size" if kind is None else "DeepSpeed's own bucket size"
        lines.append(f"note: scope bucket makes {name} ({bucket:g} elements) part of the mathematics")
    return "\n".join(lines)


def scale_table(
    config: Mapping[str, Any], block: Block, parameters: float, cluster: Cluster, tensors: int
) -> str:
    """The costs of an optimizer step at a given scale, beside stock's.

    Args:
        config: the ds_config.
        block: its block.
        parameters: whose gradients one data-parallel rank reduces.
        cluster: its ranks; of `ranks_per_worker` as the block says.
        tensors: that the parameters are made of.
    """
    job = job_of(config, block, parameters, tensors)
    stock, ours = stock_costs(job, cluster), block_costs(block, job, cluster)
    per_worker = "a rank" if cluster.ranks_per_worker == 1 else f"{cluster.ranks_per_worker} ranks"
    lines = [
        f"a step of {parameters:g} parameters on {cluster.ranks} data-parallel ranks, {cluster.on_node} on a "
        f"node; a worker is {per_worker}:",
        "                                     stock        block    ratio",
        _row("GB sent per rank", stock.sent / 1e9, ours.sent / 1e9),
        _row("GB leaving a node", stock.leaving / 1e9, ours.leaving / 1e9),
        _row("GB of memory per rank", stock.memory / 1e9, ours.memory / 1e9),
        _row("seconds, estimated", stock.seconds, ours.seconds),
    ]
    if job.reductions > 1:
        lines.append(f"  with ZeRO-2 in {job.reductions} reductions, one for each micro-step")
    if exchanges(block, cluster):
        message = message_bytes(config, block, cluster, parameters)
        if message < _SMALL_MESSAGE:
            needed = block.tile_bytes * _SMALL_MESSAGE / message / 2**20
            lines.append(
                f"  note: workers exchange messages of {message / 2**10:.1f} KiB, and larger ones are "
                f"faster: set tile_bytes to {needed:.0f} MiB for 64 KiB, or make workers larger"
            )
    return "\n".join(lines)


def job_of(config: Mapping[str, Any], block: Block, parameters: float, tensors: int) -> Job:
    """What a ds_config has reduced."""
    job = Job(parameters, _width(config), "all", min(_bucket(config), max(int(parameters), 1)), tensors)
    if _engine_without_owners(config) is None:
        job = replace(job, owners="even" if job.buckets == 1 else "one")
    return replace(job, copies=extrapolation_copies(config, block), reductions=_reductions(config))


def message_bytes(config: Mapping[str, Any], block: Block, cluster: Cluster, parameters: float) -> float:
    """What a rank sends to one of another worker for a tile."""
    width = _width(config)
    columns = columns_per_tile(block, cluster.ranks, cluster.workers, 2 * width)
    return width * min(columns, min(_bucket(config), parameters) / cluster.ranks)


def _row(name: str, stock: float, ours: float) -> str:
    ratio = f"{ours / stock:.3f}" if stock else "-"
    return f"  {name:26s}{stock:13.4g}{ours:13.4g}{ratio:>9s}"


def _bucket(config: Mapping[str, Any]) -> int:
    """Elements."""
    if _engine_without_owners(config) is not None:
        return BUCKET
    return int(lookup(config, "zero_optimization.reduce_bucket_size", BUCKET))


def _width(config: Mapping[str, Any]) -> int:
    """Bytes of a gradient's element."""
    return 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4


def _reductions(config: Mapping[str, Any]) -> int:
    """Of all gradients, in a step."""
    steps = lookup(config, "gradient_accumulation_steps", 1)
    reduces_each = lookup(config, "zero_optimization.stage", 0) == 2
    return int(steps) if reduces_each and isinstance(steps, int) else 1


def _engine_without_owners(config: Mapping[str, Any]) -> str | None:
    """The kind of engine in which every rank needs the whole result, if the config makes one of these."""
    stage = lookup(config, "zero_optimization.stage", 0)
    if stage == 0:
        return "ZeRO-0"
    adds_up = lookup(config, "data_types.grad_accum_dtype", None)
    offload = lookup(config, "zero_optimization.offload_optimizer.device", None)
    in_float32 = adds_up in ("fp32", "float32", "float", "torch.float32")
    if stage == 1 and lookup(config, "bf16.enabled", False) is True and in_float32 and offload != "cpu":
        return "BF16_Optimizer"
    return None


def extrapolation_copies(config: Mapping[str, Any], block: Block) -> int:
    """Copies of the parameters that a rank keeps."""
    if block.extrapolation is None:
        return 0
    accumulates = lookup(config, "gradient_accumulation_steps", 1) not in (1, None)
    adds_up = block.extrapolation.needs_gradient and lookup(config, "zero_optimization.stage", 0) == 2
    return 2 if adds_up and accumulates else 1


def _extrapolation_line(config: Mapping[str, Any], block: Block) -> str:
    rule, copies = block.extrapolation, extrapolation_copies(config, block)
    assert rule is not None
    words = "two copies" if copies == 2 else "one copy"
    adds_up = rule.needs_gradient and lookup(config, "zero_optimization.stage", 0) == 2
    if adds_up and "gradient_accumulation_steps" not in config and "train_batch_size" in config:
        words += " (two if DeepSpeed comes to accumulate gradients)"
    told = "no communication"
    if rule.needs_gradient and block.worker not in ("rank", 1):
        told = "once a step its gradient is averaged over the worker's ranks"
    return (
        f"extra memory per rank for {type(rule).__name__}: {words} of the parameters in their own dtype "
        f"({copies * _width(config)} bytes a parameter); {told}"
    )
