"""What reducing the gradients of one optimizer step costs a rank, by formulas; docs/scaling.md derives them.

    P   parameters whose gradients a rank reduces: the model's, by its tensor- and pipeline-parallel ranks
    b   bytes of an element as it is communicated, B = b P
    D   data-parallel ranks, of which k are on a node, and n make one of W = D/n workers
    S   decisions: one for a bucket, a parameter tensor, or the model

Collectives run one after another, and each takes as long as the slower of its two networks: between nodes,
and inside a node. An exchange is one collective, since its two levels overlap tile by tile.
tests/system/test_scaling.py compares the byte counts with the kernel's counters. Times are estimates for the
given bandwidths, and nothing else overlaps. Only the standard library is imported.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from ds_gradmix.costs.inputs import BUCKET_ELEMENTS as BUCKET_ELEMENTS
from ds_gradmix.costs.inputs import Cluster as Cluster
from ds_gradmix.costs.inputs import Owners as Owners
from ds_gradmix.costs.inputs import ReductionPlan as ReductionPlan
from ds_gradmix.costs.inputs import RuleCost as RuleCost
from ds_gradmix.costs.inputs import Workload as Workload

_GRAM_COPIES = 5  # of a W x W float64 matrix, alive while a decision is taken


class CollectiveCost(NamedTuple):
    """The cost of one collective operation on all gradients."""

    sent: float  # bytes, by a rank
    leaving: float  # bytes that leave a node, from all of its ranks


class Costs(NamedTuple):
    """The costs of an optimizer step for a rank."""

    sent: float  # bytes
    leaving: float  # bytes that leave a node, from all of its ranks
    memory: float  # bytes besides parameters, gradients and optimizer states
    seconds: float


def all_reduce(num_bytes: float, cluster: Cluster) -> CollectiveCost:
    """An all-reduce over all ranks by a ring: a rank sends 2 (D-1)/D B."""
    return _ring(2 * (cluster.ranks - 1) / cluster.ranks * num_bytes, cluster.ranks, cluster)


def reduce_by_deepspeed(num_bytes: float, workload: Workload, cluster: Cluster) -> CollectiveCost:
    """DeepSpeed's own reduction: an all-reduce, and at stage 3 its first half, a reduce-scatter by a ring."""
    if workload.owners == "ZeRO-3":
        return _ring((cluster.ranks - 1) / cluster.ranks * num_bytes, cluster.ranks, cluster)
    return all_reduce(num_bytes, cluster)


def exchange_gradients(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """Each rank gets all workers' gradients for its share: (n-1)/n B inside workers, (W-1)/W B/n across."""
    k, n, w = cluster.on_node, cluster.ranks_per_worker, cluster.workers
    sent = (n - 1) / n * num_bytes + (w - 1) / w * num_bytes / n
    leaving = k * max(n - k, 0) / n * num_bytes + k * (w - max(k // n, 1)) / w * num_bytes / n
    return [CollectiveCost(sent, leaving)]


def by_node(cluster: Cluster) -> Cluster:
    """The same with nodes as workers, inside of which gradients are summed first if there are several."""
    return replace(cluster, ranks_per_worker=cluster.on_node if cluster.ranks > cluster.on_node else 1)


def send_to_owners(num_bytes: float, cluster: Cluster) -> CollectiveCost:
    """The combined shares go to the one owner, or the few, of a bucket: (D-1)/D B/D."""
    d, k = cluster.ranks, cluster.on_node
    return CollectiveCost((d - 1) / d * num_bytes / d, k * (d - k) / d * num_bytes / d)


def gather_on_every_rank(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """The combined shares go to every rank by rings: (W-1)/W B/n across workers, then (n-1)/n B inside."""
    d, k, n, w = cluster.ranks, cluster.on_node, cluster.ranks_per_worker, cluster.workers
    share = (w - 1) / w * num_bytes / n
    across = CollectiveCost(share, min(n, k) * share if d > k else 0.0)
    return [across, _ring((n - 1) / n * num_bytes, n, cluster)]


def average_inside_workers(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """A worker's ranks average their past gradients by a ring: 2 (n-1)/n B."""
    n = cluster.ranks_per_worker
    return [_ring(2 * (n - 1) / n * num_bytes, n, cluster)]


def _ring(sent: float, num_ranks: int, cluster: Cluster) -> CollectiveCost:
    """A ring through neighbouring ranks leaves each node by one link."""
    return CollectiveCost(sent, sent if num_ranks > cluster.on_node else 0.0)


def block_costs(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> Costs:
    """The costs of a step; those of DeepSpeed's own averaging for the plan that does nothing."""
    collectives = gradient_collectives(plan, workload, cluster)
    collectives += _decision_collectives(plan, workload, cluster)
    collectives *= workload.reductions
    if plan.averages_past_gradient:
        collectives += average_inside_workers(workload.num_bytes, cluster)
    seconds = decision_seconds(plan, workload, cluster) * workload.reductions
    read_and_written = _read_and_written_bytes(plan, workload, cluster) * workload.reductions
    seconds += read_and_written / cluster.memory_bandwidth
    for sent, leaving in collectives:
        inside_node = sent - leaving / cluster.on_node
        seconds += max(leaving / cluster.node_bandwidth, inside_node / cluster.link_bandwidth)
    sent, leaving = (sum(column) for column in zip(*collectives, strict=True))
    return Costs(sent, leaving, _memory_bytes(plan, workload, cluster), seconds)


def gradient_collectives(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> list[CollectiveCost]:
    """The collectives of one reduction that carry gradients."""
    num_bytes = workload.num_bytes
    if plan.transport != "exchange":
        return [reduce_by_deepspeed(workload.parameters * workload.stock_bytes, workload, cluster)]
    if plan.by_node:
        cluster = by_node(cluster)
    collectives = exchange_gradients(num_bytes, cluster)
    if workload.every_rank_needs_result:
        return collectives + gather_on_every_rank(num_bytes, cluster)
    if plan.decides_for_model:
        collectives *= 2  # the first time for the decision alone
    if workload.owners == "one":
        collectives.append(send_to_owners((2 if plan.has_momentum else 1) * num_bytes, cluster))
    return collectives


def _decision_collectives(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> list[CollectiveCost]:
    """Sketches are exchanged, Gram matrices summed and weights broadcast; a scaling rule's terms are summed
    for every tensor.
    """
    w, collectives = cluster.workers, []
    if plan.needs_gram and plan.sketch_size:
        collectives += exchange_gradients(4.0 * plan.sketch_numbers(workload), cluster)
    if plan.needs_gram:
        numbers = plan.decisions(workload) * (w * w + w + 3 + plan.mixing.state_numbers)
        collectives.append(_ring(8.0 * numbers, cluster.ranks, cluster))
    if plan.needs_norms:
        numbers = plan.decisions(workload) * (2 * w + 3)
        collectives.append(_ring(8.0 * numbers, cluster.ranks, cluster))
    if plan.observed_sketch_size is not None:
        observed = min(plan.observed_sketch_size * workload.buckets, workload.parameters)
        num_bytes = 4.0 * observed if plan.observed_sketch_size else workload.num_bytes
        collectives += exchange_gradients(num_bytes, cluster)
        collectives.append(_ring(8.0 * (w * w + w + plan.mixing.state_numbers), cluster.ranks, cluster))
    if plan.scaling is not None and plan.scaling.layer_terms > 0:
        collectives.append(all_reduce(8.0 * plan.scaling.layer_terms * workload.tensors, cluster))
    return collectives


def decision_seconds(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> float:
    """Gram matrices, and the programs of the decisions, which a bucket's parameters share."""
    launches = plan.mixing.launches * cluster.launch_s
    if not plan.needs_gram:
        rounds = 1 if plan.scope == "model" else workload.buckets
        return rounds * launches if plan.needs_norms else 0.0
    w, rounds = cluster.workers, 1 if plan.scope == "model" else workload.buckets
    elements = plan.sketch_numbers(workload) if plan.sketch_size else workload.parameters
    seconds = 2 * w * elements / cluster.ranks_per_worker / cluster.fp64_rate
    return seconds + rounds * (launches + plan.mixing.steps * cluster.step_s)


def _memory_bytes(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> float:
    num_bytes = plan.parameter_copies * workload.parameters * workload.grad_bytes
    if plan.observed_sketch_size is not None:
        num_bytes += 12.0 * min(plan.observed_sketch_size, workload.parameters) * workload.buckets
        num_bytes += _GRAM_COPIES * 8.0 * cluster.workers**2
    copied = min(workload.bucket_elements, workload.parameters)  # by DeepSpeed, before it reduces them
    if workload.owners == "BF16_Optimizer":
        copied = workload.parameters  # of a parameter group
    if plan.needs_gram:
        num_bytes += _decision_bytes(plan, workload, cluster)
    if plan.transport != "exchange":
        tile_bytes = plan.tile_bytes if plan.transport == "weighted" and plan.by_parameter else 0
        return num_bytes + copied * workload.stock_bytes + tile_bytes
    num_bytes += 3 * plan.tile_bytes
    if workload.owners == "ZeRO-0":
        num_bytes += copied * workload.stock_bytes
    if workload.every_rank_needs_result and plan.decides_for_model:
        num_bytes += 1.5 * plan.tile_bytes * workload.buckets  # that wait for the decision
    if plan.has_momentum:
        num_bytes += 8 * workload.parameters / cluster.ranks
    return num_bytes


def _decision_bytes(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> float:
    """Gram matrices on the rank that decides; signs, a sketch, and what is sent and received of it."""
    decisions_per_bucket = math.ceil(plan.decisions(workload) / workload.buckets)
    num_bytes = _GRAM_COPIES * 8.0 * cluster.workers**2 * decisions_per_bucket
    if plan.sketch_size:
        sketch = 4 * min(plan.sketch_size, workload.parameters)
        at_once = 3 * max(sketch, plan.tile_bytes) if plan.scope == "parameter" else 3 * sketch
        num_bytes += sketch + at_once
    return num_bytes


def _read_and_written_bytes(plan: ReductionPlan, workload: Workload, cluster: Cluster) -> float:
    """By operations on the P gradients that a rank sends, and on the P/n that it combines.

    Stock divides a bucket and copies it; where every rank needs the result, it copies that back, too. To
    weigh a bucket takes the place of the division.
    """
    b, sketching = workload.grad_bytes, workload.grad_bytes if plan.sketch_size else 0
    copies = (2 if workload.every_rank_needs_result else 1) * 2.0 * b
    sketching += b * plan.needs_norms + (2 * b if plan.observed_sketch_size is not None else 0)
    if plan.transport == "rescaled":
        sketching += 2 * b  # and DeepSpeed divides as well
    if plan.transport != "exchange":
        by_parameter = 16 if plan.transport == "weighted" and plan.by_parameter else 0
        return workload.parameters * (sketching + 2 * b + by_parameter + copies)
    n = (by_node(cluster) if plan.by_node else cluster).ranks_per_worker
    sending = sketching + (0.0 if workload.owners == "one" else copies)  # from where it lies
    combining = 8.0 + b + plan.mixing.bytes_per_element  # the weighted sum, and its result
    if n > 1:  # a worker's mean, or a node's weighted sum
        sending += b
        combining += (8 if plan.by_node else 16) + b
    if plan.needs_gram and not plan.sketch_size:
        combining += 16 + b + 4 * b  # products in float64; gradients are kept in the bucket and read again
    if plan.scaling is not None:
        combining += plan.scaling.bytes_per_element
    return workload.parameters * (sending + combining / n)
