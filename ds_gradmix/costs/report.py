"""What `ds_gradmix check` says about the costs of a gradmix block: model.py's formulas for a ds_config."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ds_gradmix.config import ConfigError, GradmixConfig, GramSketch
from ds_gradmix.config_messages import wrong_value
from ds_gradmix.costs import model
from ds_gradmix.costs.model import Cluster, ReductionPlan, Workload
from ds_gradmix.engines.compatibility import lookup
from ds_gradmix.exchange.plan import columns_per_tile
from ds_gradmix.exchange.transport import Transport, choose_transport, decides_before
from ds_gradmix.rules import NormMixing

_SMALL_MESSAGE = 64 * 2**10  # bytes; with smaller messages a network is far from its bandwidth
_USUAL_SKETCH = GramSketch(sketch=2**20)
_ROWS = ("GB sent per rank", "GB leaving a node", "GB of memory per rank", "seconds, estimated")


def reduction_plan(config: Mapping[str, Any], block: GradmixConfig, num_workers: int) -> ReductionPlan:
    """What the formulas need to know of a block in a ds_config, for a number of workers."""
    scaling, extrapolation = block.scaling, block.extrapolation
    needs_gradient = extrapolation is not None and extrapolation.needs_gradient
    accumulates = _size(config, "gradient_accumulation_steps", 1) > 1
    keeps_two = needs_gradient and accumulates and _stage(config) == 2
    transport = choose_transport(block, num_workers)
    exchanges, active = transport is Transport.EXCHANGE, transport is not Transport.STOCK
    needs_gram = active and block.mixing.needs_gram
    observes = block.only_observes and num_workers > 1
    return ReductionPlan(
        transport=transport.value,
        scope=block.scope,
        needs_gram=needs_gram,
        by_node=exchanges and decides_before(block),
        sketch_size=(block.sketch_size or 0) if needs_gram else 0,
        needs_norms=active and isinstance(block.mixing, NormMixing),
        observed_sketch_size=(block.sketch_size or 0) if observes else None,
        by_parameter=active and block.weighs_by_parameter,
        mixing=block.mixing.cost(num_workers),
        scaling=scaling.cost(num_workers) if exchanges and scaling is not None else None,
        has_momentum=exchanges and scaling is not None and scaling.factor_momentum > 0,
        averages_past_gradient=needs_gradient,
        parameter_copies=0 if extrapolation is None or _stage(config) == 3 else 1 + keeps_two,
        tile_bytes=block.tile_bytes,
    )


def workload_of(config: Mapping[str, Any], parameters: float, tensors: int) -> Workload:
    """What is reduced with a ds_config, for a number of parameters and of tensors that they consist of."""
    grad_bytes, engine = _grad_bytes(config), _kind_of_engine(config)
    communicated = lookup(config, "communication_data_type", None)
    stock_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}.get(communicated, grad_bytes)
    size, micro_steps = model.BUCKET_ELEMENTS, _size(config, "gradient_accumulation_steps", 1)
    if engine is None:
        size = _size(config, "zero_optimization.reduce_bucket_size", size)
    return Workload(
        parameters,
        min(grad_bytes, stock_bytes),  # an exchange converts to no wider dtype before it sends
        engine or ("even" if parameters <= size else "one"),
        stock_bytes,
        size,
        tensors,
        reductions=micro_steps if _stage(config) in (2, 3) else 1,
    )


def relative_bytes(
    config: Mapping[str, Any], block: GradmixConfig, clusters: Sequence[Cluster]
) -> list[dict[str, float]]:
    """The bytes that a rank sends relative to stock DeepSpeed, a row for each data-parallel size."""
    even = workload_of(config, 1.0, 1)
    workloads = {"even buckets": even, "one owner a bucket": replace(even, owners="one")}
    if even.owners not in ("even", "one"):
        workloads = {f"buckets of {even.owners}": even}
    rows = []
    for cluster in clusters:
        plan = reduction_plan(config, block, cluster.workers)
        row: dict[str, float] = {"ranks": cluster.ranks}
        for kind, workload in workloads.items():
            sent = sum(cost.sent for cost in model.gradient_collectives(plan, workload, cluster))
            stock = model.reduce_by_deepspeed(workload.stock_bytes, workload, cluster).sent
            row[kind] = sent / stock if stock else 1.0
        rows.append(row)
    return rows


def cost_table(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The lines of a table of `relative_bytes`."""
    kinds = list(rows[0])[1:]
    lines = ["gradients sent per rank and reduction, relative to stock DeepSpeed:"]
    lines.append("    ranks  " + "  ".join(kinds))
    for row in rows:
        lines.append(f"  {row['ranks']:7.0f}" + "".join(f"  {row[kind]:{len(kind)}.3f}" for kind in kinds))
    return lines


def memory_notes(config: Mapping[str, Any], block: GradmixConfig) -> list[str]:
    """What a reduction needs besides bytes on the network; an indented line goes on with the last."""
    even, lines = workload_of(config, 1.0, 1), []
    plan = reduction_plan(config, block, num_workers=2)  # or more
    if plan.sketch_size:
        size = f"{4 * plan.sketch_size / 2**20:g} MiB"
        lines.append(f"  and for each decision a sketch, at most {size}, whatever the number of ranks")
    lines += _memory_lines(plan, even)
    if block.extrapolation is not None:
        lines.append(_extrapolation_line(config, block, plan, block.extrapolation.type_name()))
    if plan.needs_gram and block.scope == "bucket":
        name = "DeepSpeed's own bucket size" if even.every_rank_needs_result else "reduce_bucket_size"
        size = f"{name} ({even.bucket_elements:g} elements)"
        lines.append(f"note: scope bucket makes {size} part of the mathematics")
    return lines


def _memory_lines(plan: ReductionPlan, workload: Workload) -> Iterator[str]:
    size, tile = workload.bucket_elements * workload.stock_bytes / 2**20, plan.tile_bytes / 2**20
    stock = f"stock: a copy of the bucket, at most {size:g} MiB"
    if workload.owners == "ZeRO-0":
        stock += " and a parameter"
    if workload.owners == "BF16_Optimizer":
        stock = "stock: a copy in bf16 of all gradients of a parameter group"
    reducing = "extra memory per rank while a bucket is reduced: at most"
    if plan.transport == "exchange":
        besides = " besides stock's" if workload.owners == "ZeRO-0" else ""
        yield f"{reducing} {3 * tile:g} MiB, 3 tiles{besides} ({stock})"
        if workload.every_rank_needs_result and plan.decides_for_model:
            yield "  and 1.5 tiles for every bucket that waits for the decision on the model"
    elif plan.transport == "stock":
        yield f"extra memory per rank: none, this is stock DeepSpeed ({stock})"
    else:
        yield f"{reducing} {tile if plan.by_parameter else 0:g} MiB besides stock's ({stock})"
    if plan.needs_gram:
        each = "every parameter of a bucket" if plan.scope == "parameter" else "each decision"
        yield f"  and W x W float64 for {each}"
    if plan.sketch_size:
        at_once = max(12 * plan.sketch_size, 3 * plan.tile_bytes * (plan.scope == "parameter"))
        yield f"  and for sketches {(4 * plan.sketch_size + at_once) / 2**20:g} MiB before that"
    if plan.observed_sketch_size is not None:
        sketch = f"{4 * plan.observed_sketch_size / 2**10:g} KiB of every bucket"
        what = f"a sketch, {sketch}, is" if plan.observed_sketch_size else "all gradients are"
        yield f"  and to observe the workers {what} exchanged after each step"
    if plan.has_momentum:
        yield "  and for momentum 4 bytes per parameter / ranks throughout, as much again during reductions"


def _extrapolation_line(
    config: Mapping[str, Any], block: GradmixConfig, plan: ReductionPlan, name: str
) -> str:
    needs_gradient = plan.averages_past_gradient
    steps = lookup(config, "gradient_accumulation_steps", None)
    undecided = steps == "auto" or (steps is None and "train_batch_size" in config)
    words, num_bytes = "one copy", plan.parameter_copies * _grad_bytes(config)
    if _stage(config) == 3:
        return f"extra memory per rank for {name}: a copy of persistent parameters alone; no communication"
    if plan.parameter_copies == 2:
        words = "two copies"
    elif needs_gradient and _stage(config) == 2 and undecided:
        words += " (two if DeepSpeed comes to accumulate gradients)"
    communication = "no communication"
    if needs_gradient and block.worker not in ("rank", 1):
        communication = "once a step its gradient is averaged over the worker's ranks"
    return (
        f"extra memory per rank for {name}: {words} of the parameters in their "
        f"own dtype ({num_bytes} bytes a parameter); {communication}"
    )


class StepCosts(NamedTuple):
    """What an optimizer step costs by stock DeepSpeed and by a block, and what to know about it."""

    parameters: float
    cluster: Cluster
    stock: model.Costs
    block: model.Costs
    notes: list[str]


def step_costs(
    config: Mapping[str, Any], block: GradmixConfig, parameters: float, cluster: Cluster, tensors: int
) -> StepCosts:
    """The costs of an optimizer step, beside those of stock DeepSpeed.

    A data-parallel rank reduces the gradients of `parameters` parameters, which consist of `tensors` tensors.
    """
    workload, plan = workload_of(config, parameters, tensors), reduction_plan(config, block, cluster.workers)
    stock_workload = replace(workload, grad_bytes=workload.stock_bytes)
    stock = model.block_costs(ReductionPlan(), stock_workload, cluster)
    notes = []
    if workload.reductions > 1:
        notes.append(f"with ZeRO-2 in {workload.reductions} reductions, one for each micro-step")
    notes += _notes(config, block, plan, workload, cluster)
    if plan.transport == "exchange":
        by = model.by_node(cluster) if plan.by_node else cluster
        comm_bytes = 2 * workload.grad_bytes
        columns = columns_per_tile(block, by.ranks, by.workers, comm_bytes, by_node=plan.by_node)
        notes += _message_note(columns, plan.tile_bytes, workload, cluster)
    return StepCosts(parameters, cluster, stock, model.block_costs(plan, workload, cluster), notes)


def step_table(costs: StepCosts) -> list[str]:
    """The lines of a table of `step_costs`."""
    cluster = costs.cluster
    per_worker = "a rank" if cluster.ranks_per_worker == 1 else f"{cluster.ranks_per_worker} ranks"
    lines = [
        f"a step of {costs.parameters:g} parameters on {cluster.ranks} data-parallel ranks, "
        f"{cluster.on_node} on a node; a worker is {per_worker}:",
        "                                     stock        block    ratio",
    ]
    for name, before, after in zip(_ROWS, costs.stock, costs.block, strict=True):
        before, after = (cost / (1e9 if name.startswith("GB") else 1.0) for cost in (before, after))
        ratio = f"{after / before:.3f}" if before else "-"
        lines.append(f"  {name:25s} {before:12.4g} {after:12.4g} {ratio:>8s}")
    return lines + [f"  {note}" for note in costs.notes]


def _notes(
    config: Mapping[str, Any],
    block: GradmixConfig,
    plan: ReductionPlan,
    workload: Workload,
    cluster: Cluster,
) -> Iterator[str]:
    """What decisions cost, and which way of deciding and summing is fastest, where there is a choice."""
    deciding = model.decision_seconds(plan, workload, cluster) * workload.reductions
    if deciding > 0.02 * model.block_costs(plan, workload, cluster).seconds and plan.scope != "model":
        yield (
            f"note: decisions take {deciding:.3g} of these seconds: fewer are needed with a larger "
            'reduce_bucket_size, or one with scope "model"; larger workers make each of them shorter'
        )
    if block.scaling is not None or cluster.workers == 1:
        return
    exact, sketch = {"gram": "exact"}, {"gram": block.gram if block.sketch_size else _USUAL_SKETCH}
    grams: list[dict[str, Any]] = [exact, sketch] if block.mixing.needs_gram else [{}]
    found = {}
    for gram, transport in itertools.product(grams, ("deepspeed", "exchange")):
        other = block.model_copy(update={**gram, "transport": transport})
        words = json.dumps(other.model_dump(include={*gram, "transport"}))[1:-1]
        other_plan = reduction_plan(config, other, cluster.workers)
        found[words] = model.block_costs(other_plan, workload, cluster).seconds
    fastest = min(found, key=lambda words: found[words])
    yield f"fastest of its kind on this cluster, on paper: {fastest}, {found[fastest]:.4g} seconds"


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
    yield f"note: workers exchange messages of {size}, and larger ones are faster: {ways}"


def _stage(config: Mapping[str, Any]) -> Any:
    return lookup(config, "zero_optimization.stage", 0)


def _size(config: Mapping[str, Any], path: str, default: int) -> int:
    """A positive number of the config; the default where it is "auto", which others fill in."""
    value = lookup(config, path, default)
    if value is None or value == "auto":
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 <= value < 2**63:
        allowed = f"a number, >= 1, < 2^63 (default {default})"
        raise ConfigError(wrong_value(path, value, allowed, "change it, or remove it for the default"))
    return int(value)


def _grad_bytes(config: Mapping[str, Any]) -> int:
    """The bytes of a gradient's element."""
    return 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4


def _kind_of_engine(config: Mapping[str, Any]) -> model.Owners | None:
    """The kind of engine, where owners do not depend on the bucket: every rank needs the whole result, or has
    an equal part of each parameter.
    """
    if _stage(config) in (0, 3):
        return "ZeRO-3" if _stage(config) == 3 else "ZeRO-0"
    accumulation_dtype = lookup(config, "data_types.grad_accum_dtype", None)
    sums_in_fp32 = accumulation_dtype in ("fp32", "float32", "float", "torch.float32")
    bf16 = lookup(config, "bf16.enabled", False) is True
    offloads = lookup(config, "zero_optimization.offload_optimizer.device", None) == "cpu"
    return "BF16_Optimizer" if _stage(config) == 1 and bf16 and sums_in_fp32 and not offloads else None
