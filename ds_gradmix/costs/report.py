"""What `ds_gradmix check` prints about the costs of a gradmix block: model.py's formulas for a ds_config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ds_gradmix.config import GradmixConfig
from ds_gradmix.costs import model
from ds_gradmix.costs.model import Cluster, ReductionPlan, Workload
from ds_gradmix.engines.compatibility import lookup
from ds_gradmix.exchange.exchange import columns_per_tile
from ds_gradmix.exchange.transport import Transport, choose_transport

_SMALL_MESSAGE = 64 * 2**10  # bytes; with smaller messages a network is far from its bandwidth
_TRANSPORTS: dict[Transport, Literal["stock", "weighted", "exchange"]] = {
    Transport.STOCK: "stock",
    Transport.WEIGHTED: "weighted",
    Transport.EXCHANGE: "exchange",
}


def reduction_plan(config: Mapping[str, Any], block: GradmixConfig, num_workers: int) -> ReductionPlan:
    """What the formulas need to know of a block in a ds_config, for a number of workers."""
    extrapolation = block.extrapolation
    return ReductionPlan(
        transport=_TRANSPORTS[choose_transport(block, num_workers)],
        scope=block.scope,
        needs_gram=block.mixing.needs_gram,
        scales=block.scaling is not None,
        has_momentum=block.scaling is not None and block.scaling.factor_momentum > 0,
        averages_past_gradient=extrapolation is not None and extrapolation.needs_gradient,
        parameter_copies=_parameter_copies(config, block),
        tile_bytes=block.tile_bytes,
    )


def workload_of(config: Mapping[str, Any], parameters: float, tensors: int) -> Workload:
    """What is reduced with a ds_config, for a number of parameters and of tensors that they consist of."""
    engine = _engine_without_owners(config)
    micro_steps = lookup(config, "gradient_accumulation_steps", 1)
    workload = Workload(
        parameters,
        min(_grad_bytes(config), _stock_bytes(config)),  # an exchange widens nothing before it sends it
        engine or "one",
        _stock_bytes(config),
        min(_bucket_elements(config), max(int(parameters), 1)),
        tensors,
        reductions=int(micro_steps) if _stage(config) == 2 and isinstance(micro_steps, int) else 1,
    )
    return replace(workload, owners="even") if engine is None and workload.buckets == 1 else workload


def cost_table(config: Mapping[str, Any], block: GradmixConfig, clusters: Sequence[Cluster]) -> str:
    """The bytes sent relative to stock DeepSpeed for several data-parallel sizes, and the memory needed."""
    engine = _engine_without_owners(config)
    columns = ["even buckets", "one owner a bucket"] if engine is None else [f"buckets of {engine}"]
    lines = ["gradients sent per rank and reduction, relative to stock DeepSpeed:"]
    lines.append("    ranks  " + "  ".join(columns))
    owners: list[model.Owners] = ["even", "one"] if engine is None else [engine]
    workloads = [replace(workload_of(config, 1.0, 1), owners=owner) for owner in owners]
    for cluster in clusters:
        plan = reduction_plan(config, block, cluster.workers)
        ratios = [_sent_ratio(plan, workload, cluster) for workload in workloads]
        cells = (f"{ratio:{len(column)}.3f}" for ratio, column in zip(ratios, columns, strict=True))
        lines.append(f"  {cluster.ranks:7d}  " + "  ".join(cells))
    lines += _memory_lines(config, block)
    if block.extrapolation is not None:
        lines.append(_extrapolation_line(config, block))
    if block.mixing.needs_gram and block.scope == "bucket":
        name = "reduce_bucket_size" if engine is None else "DeepSpeed's own bucket size"
        size = _bucket_elements(config)
        lines.append(f"note: scope bucket makes {name} ({size:g} elements) part of the mathematics")
    return "\n".join(lines)


def _sent_ratio(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> float:
    stock = model.all_reduce(workload.stock_bytes, cluster).sent
    sent = sum(cost.sent for cost in model.gradient_collectives(plan, workload, cluster))
    return sent / stock if stock else 1.0


def _memory_lines(config: Mapping[str, Any], block: GradmixConfig) -> Iterator[str]:
    engine = _engine_without_owners(config)
    size = _bucket_elements(config) * _stock_bytes(config) / 2**20
    stock = f"stock: a copy of the bucket, at most {size:g} MiB"
    if engine == "ZeRO-0":
        stock += " and a parameter"
    if engine == "BF16_Optimizer":
        stock = "stock: a copy in bf16 of all gradients of a parameter group"
    plan = reduction_plan(config, block, num_workers=2)  # or more
    tile = plan.tile_bytes / 2**20
    if plan.transport == "exchange":
        tiles = f"{3 * tile:g} MiB, 3 tiles" + (" besides stock's" if engine == "ZeRO-0" else "")
        yield f"extra memory per rank while a bucket is reduced: at most {tiles} ({stock})"
        if engine is not None and plan.decides_for_model:
            yield "  and 1.5 tiles for every bucket that waits for the decision on the model"
        if plan.needs_gram:
            each = "every parameter of a bucket" if plan.scope == "parameter" else "each decision"
            yield f"  and W x W float64 for {each}"
    elif plan.transport == "stock":
        yield f"extra memory per rank: none, this is stock DeepSpeed ({stock})"
    else:
        most = f"at most {tile:g} MiB besides stock's ({stock})"
        yield f"extra memory per rank while a bucket is reduced: {most}"
    if plan.has_momentum:
        yield "  and for momentum 4 bytes per parameter / ranks throughout, as much again during reductions"


def _extrapolation_line(config: Mapping[str, Any], block: GradmixConfig) -> str:
    rule, copies = block.extrapolation, _parameter_copies(config, block)
    assert rule is not None
    words = "two copies" if copies == 2 else "one copy"
    sums_micro_steps = rule.needs_gradient and _stage(config) == 2
    if sums_micro_steps and "gradient_accumulation_steps" not in config and "train_batch_size" in config:
        words += " (two if DeepSpeed comes to accumulate gradients)"
    communication = "no communication"
    if rule.needs_gradient and block.worker not in ("rank", 1):
        communication = "once a step its gradient is averaged over the worker's ranks"
    return (
        f"extra memory per rank for {type(rule).__name__}: {words} of the parameters in their own dtype "
        f"({copies * _grad_bytes(config)} bytes a parameter); {communication}"
    )


def scale_table(
    config: Mapping[str, Any], block: GradmixConfig, parameters: float, cluster: Cluster, tensors: int
) -> str:
    """The costs of an optimizer step, beside those of stock DeepSpeed.

    A data-parallel rank reduces the gradients of `parameters` parameters, which consist of `tensors` tensors.
    """
    workload = workload_of(config, parameters, tensors)
    plan = reduction_plan(config, block, cluster.workers)
    stock, ours = model.stock_costs(workload, cluster), model.block_costs(plan, workload, cluster)
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
    if workload.reductions > 1:
        lines.append(f"  with ZeRO-2 in {workload.reductions} reductions, one for each micro-step")
    if plan.transport == "exchange":
        columns = columns_per_tile(block, cluster.ranks, cluster.workers, 2 * workload.grad_bytes)
        lines += _message_note(columns, plan.tile_bytes, workload, cluster)
    return "\n".join(lines)


def _row(name: str, stock: float, ours: float) -> str:
    ratio = f"{ours / stock:.3f}" if stock else "-"
    return f"  {name:25s} {stock:12.4g} {ours:12.4g} {ratio:>8s}"


def _message_note(columns: int, tile_bytes: int, workload: Workload, cluster: Cluster) -> Iterator[str]:
    """A note if the message that a rank sends another at a time, of so many columns, is small."""
    width, share = workload.grad_bytes, min(workload.bucket_elements, workload.parameters) / cluster.ranks
    message = width * min(columns, share)
    if message >= _SMALL_MESSAGE:
        return
    advice = []
    if width * share < _SMALL_MESSAGE and not workload.every_rank_needs_result and workload.buckets > 1:
        advice.append(f"reduce_bucket_size {_SMALL_MESSAGE * cluster.ranks // width}")
    if width * columns < _SMALL_MESSAGE:
        advice.append(f"tile_bytes {tile_bytes * _SMALL_MESSAGE / (width * columns) / 2**20:.0f} MiB")
    ways = "make workers larger"
    if advice:
        ways = f"set {' and '.join(advice)} for 64 KiB, or {ways}"
    size = f"{message / 2**10:.1f} KiB"
    yield f"  note: workers exchange messages of {size}, and larger ones are faster: {ways}"


def _stage(config: Mapping[str, Any]) -> Any:
    return lookup(config, "zero_optimization.stage", 0)


def _bucket_elements(config: Mapping[str, Any]) -> int:
    if _engine_without_owners(config) is not None:
        return model.BUCKET_ELEMENTS
    return int(lookup(config, "zero_optimization.reduce_bucket_size", model.BUCKET_ELEMENTS))


def _grad_bytes(config: Mapping[str, Any]) -> int:
    """The bytes of a gradient's element."""
    return 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4


def _stock_bytes(config: Mapping[str, Any]) -> int:
    """The bytes of an element as DeepSpeed communicates it."""
    communicated = lookup(config, "communication_data_type", None)
    return {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}.get(communicated, _grad_bytes(config))


def _engine_without_owners(config: Mapping[str, Any]) -> model.EngineWithoutOwners | None:
    """The kind of engine, if it is one in which every rank needs the whole result of a bucket."""
    if _stage(config) == 0:
        return "ZeRO-0"
    accumulation_dtype = lookup(config, "data_types.grad_accum_dtype", None)
    sums_in_fp32 = accumulation_dtype in ("fp32", "float32", "float", "torch.float32")
    bf16 = lookup(config, "bf16.enabled", False) is True
    offloads = lookup(config, "zero_optimization.offload_optimizer.device", None) == "cpu"
    return "BF16_Optimizer" if _stage(config) == 1 and bf16 and sums_in_fp32 and not offloads else None


def _parameter_copies(config: Mapping[str, Any], block: GradmixConfig) -> int:
    """How many copies of the parameters a rank keeps for extrapolation."""
    if block.extrapolation is None:
        return 0
    accumulates = lookup(config, "gradient_accumulation_steps", 1) not in (1, None)
    return 2 if block.extrapolation.needs_gradient and _stage(config) == 2 and accumulates else 1
