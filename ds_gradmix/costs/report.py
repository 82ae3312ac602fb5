"""What a block costs with a ds_config, in words and numbers: what `ds_gradmix check` prints, by costs.py's
formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_gradmix.config import GradmixConfig
from ds_gradmix.costs.model import (
    BUCKET,
    Cluster,
    Owners,
    WithoutOwners,
    Workload,
    all_reduce,
    block_costs,
    exchanges,
    gradient_hops,
    stock_costs,
)
from ds_gradmix.engines.compatibility import lookup
from ds_gradmix.exchange.exchange import columns_per_tile
from ds_gradmix.exchange.transport import Transport, choose_transport

_SMALL_MESSAGE = 64 * 2**10  # bytes; with smaller ones a network is far from its bandwidth


def cost_table(config: Mapping[str, Any], block: GradmixConfig, clusters: Sequence[Cluster]) -> str:
    """The costs for several data-parallel sizes."""
    lines = ["gradients sent per rank and reduction, relative to stock DeepSpeed:"]
    kind = _engine_without_owners(config)
    columns = ["even buckets", "one owner a bucket"] if kind is None else [f"buckets of {kind}"]
    lines.append("    ranks  " + "  ".join(columns))
    widths = {"grad_bytes": _sent_width(config), "stock_bytes": _stock_width(config)}
    ways: list[Owners] = ["even", "one"] if kind is None else [kind]
    jobs = [Workload(1.0, owners=owners, **widths) for owners in ways]
    for cluster in clusters:
        ratios = [_sent_ratio(block, job, cluster) for job in jobs]
        cells = (f"{ratio:{len(column)}.3f}" for ratio, column in zip(ratios, columns, strict=True))
        lines.append(f"  {cluster.ranks:7d}  " + "  ".join(cells))
    bucket = _bucket(config)
    lines += _memory_lines(config, block, kind)
    if block.extrapolation is not None:
        lines.append(_extrapolation_line(config, block))
    if block.mixing.needs_gram and block.scope == "bucket":
        name = "reduce_bucket_size" if kind is None else "DeepSpeed's own bucket size"
        lines.append(f"note: scope bucket makes {name} ({bucket:g} elements) part of the mathematics")
    return "\n".join(lines)


def _sent_ratio(block: GradmixConfig, job: Workload, cluster: Cluster) -> float:
    stock = all_reduce(job.stock_bytes, cluster).sent
    return sum(hop.sent for hop in gradient_hops(block, job, cluster)) / stock if stock else 1.0


def _memory_lines(config: Mapping[str, Any], block: GradmixConfig, kind: str | None) -> list[str]:
    bucket, lines = _bucket(config), []
    stock = f"stock: a copy of the bucket, at most {bucket * _stock_width(config) / 2**20:g} MiB"
    if kind == "ZeRO-0":
        stock += " and a parameter"
    if kind == "BF16_Optimizer":
        stock = "stock: a copy in bf16 of all gradients of a parameter group"
    if block.exchanges:
        tiles = f"{3 * block.tile_bytes / 2**20:g} MiB, 3 tiles"
        tiles += " besides stock's" if kind == "ZeRO-0" else ""
        lines.append(f"extra memory per rank while a bucket is reduced: at most {tiles} ({stock})")
        if kind is not None and block.decides_for_model:
            lines.append("  and 1.5 tiles for every bucket that waits for the decision on the model")
        if block.mixing.needs_gram:
            each = "every parameter of a bucket" if block.scope == "parameter" else "each decision"
            lines.append(f"  and W x W float64 for {each}")
    elif choose_transport(block, 2) is Transport.STOCK:  # with more workers than one
        lines.append(f"extra memory per rank: none, this is stock DeepSpeed ({stock})")
    else:
        tile = block.tile_bytes / 2**20
        lines.append(
            f"extra memory per rank while a bucket is reduced: at most {tile:g} MiB besides stock's ({stock})"
        )
    if block.scaling is not None and block.scaling.factor_momentum > 0:
        lines.append(
            "  and for momentum 4 bytes per parameter / ranks throughout, as much again during reductions"
        )
    return lines


def scale_table(
    config: Mapping[str, Any], block: GradmixConfig, parameters: float, cluster: Cluster, tensors: int
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
        lines += _message_note(block, job, cluster)
    return "\n".join(lines)


def _message_note(block: GradmixConfig, job: Workload, cluster: Cluster) -> Iterator[str]:
    """Whether what a rank sends to one of another worker at a time is too small for a network to be fast."""
    width = job.grad_bytes
    columns = columns_per_tile(block, cluster.ranks, cluster.workers, 2 * width)
    share = min(job.bucket, job.parameters) / cluster.ranks
    message = width * min(columns, share)
    if message >= _SMALL_MESSAGE:
        return
    advice = []
    if width * share < _SMALL_MESSAGE and not job.to_all and job.buckets > 1:
        advice.append(f"reduce_bucket_size {_SMALL_MESSAGE * cluster.ranks // width}")
    if width * columns < _SMALL_MESSAGE:
        advice.append(f"tile_bytes {block.tile_bytes * _SMALL_MESSAGE / (width * columns) / 2**20:.0f} MiB")
    ways = (
        f"set {' and '.join(advice)} for 64 KiB, or make workers larger" if advice else "make workers larger"
    )
    size = f"{message / 2**10:.1f} KiB"
    yield f"  note: workers exchange messages of {size}, and larger ones are faster: {ways}"


def job_of(config: Mapping[str, Any], block: GradmixConfig, parameters: float, tensors: int) -> Workload:
    """What a ds_config has reduced."""
    kind = _engine_without_owners(config)
    job = Workload(
        parameters,
        _sent_width(config),
        kind or "one",
        _stock_width(config),
        min(_bucket(config), max(int(parameters), 1)),
        tensors,
        extrapolation_copies(config, block),
        _reductions(config),
    )
    return replace(job, owners="even") if kind is None and job.buckets == 1 else job


def _row(name: str, stock: float, ours: float) -> str:
    ratio = f"{ours / stock:.3f}" if stock else "-"
    return f"  {name:25s} {stock:12.4g} {ours:12.4g} {ratio:>8s}"


def _bucket(config: Mapping[str, Any]) -> int:
    """Elements."""
    if _engine_without_owners(config) is not None:
        return BUCKET
    return int(lookup(config, "zero_optimization.reduce_bucket_size", BUCKET))


def _width(config: Mapping[str, Any]) -> int:
    """Bytes of a gradient's element."""
    return 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4


def _stock_width(config: Mapping[str, Any]) -> int:
    """The same as DeepSpeed sends it."""
    return {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}.get(
        lookup(config, "communication_data_type", None), _width(config)
    )


def _sent_width(config: Mapping[str, Any]) -> int:
    """The same as an exchange sends it, which gains nothing from what is widened before it is sent."""
    return min(_width(config), _stock_width(config))


def _reductions(config: Mapping[str, Any]) -> int:
    """Of all gradients, in a step."""
    steps = lookup(config, "gradient_accumulation_steps", 1)
    reduces_each = lookup(config, "zero_optimization.stage", 0) == 2
    return int(steps) if reduces_each and isinstance(steps, int) else 1


def _engine_without_owners(config: Mapping[str, Any]) -> WithoutOwners | None:
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


def extrapolation_copies(config: Mapping[str, Any], block: GradmixConfig) -> int:
    """TiedParameter of the parameters that a rank keeps."""
    if block.extrapolation is None:
        return 0
    accumulates = lookup(config, "gradient_accumulation_steps", 1) not in (1, None)
    adds_up = block.extrapolation.needs_gradient and lookup(config, "zero_optimization.stage", 0) == 2
    return 2 if adds_up and accumulates else 1


def _extrapolation_line(config: Mapping[str, Any], block: GradmixConfig) -> str:
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
