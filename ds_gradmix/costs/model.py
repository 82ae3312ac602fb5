"""What a step's reduction costs a rank at a given scale, from formulas: docs/scaling.md derives them.

    P   parameters whose gradients a rank reduces: the model's, by its tensor- and pipeline-parallel ranks
    b   bytes of an element as it travels, B = b P
    D   data-parallel ranks, of which k are on a node, and n make one of W = D/n workers
    S   decisions: one for a bucket, a parameter tensor, or the model

Every collective is a hop: what a rank sends, and what of a node's ranks' leaves the node. Hops follow each
other; each takes as long as the slower of its two networks. Bytes are held to the kernel's counters by
tests/test_scaling.py. Times are estimates for the bandwidths given, without anything overlapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ds_gradmix.config import ConfigError, GradmixConfig
from ds_gradmix.exchange.transport import Transport, choose_transport

BUCKET = 500_000_000  # elements of a bucket: DeepSpeed's default in ZeRO, and the size elsewhere
KERNELS_PER_WORKER = 9  # of a sequential decision (GAF) on the rank that takes it
_GRAM_COPIES = 5  # of W x W float64, while a decision is taken


WithoutOwners = Literal["ZeRO-0", "BF16_Optimizer"]
Owners = Literal["even", "one"] | WithoutOwners


@dataclass(frozen=True)
class Cluster:
    """Ranks and what connects them; by default nodes of 8 H100 with a 400 Gbit/s adapter each."""

    ranks: int  # D
    ranks_per_node: int = 8  # of one data-parallel group
    ranks_per_worker: int = 1  # n
    node_bandwidth: float = 400e9  # bytes/s that a node sends
    link_bandwidth: float = 450e9  # bytes/s that a rank sends inside a node
    memory_bandwidth: float = 3.35e12  # bytes/s that a rank reads and writes
    fp64_rate: float = 67e12  # operations/s of a rank's float64 matrix products
    launch_s: float = 5e-6  # of a small kernel

    def __post_init__(self) -> None:
        n, k = self.ranks_per_worker, self.on_node
        if self.ranks % n:
            raise ConfigError(f"{self.ranks} data-parallel ranks are no whole number of workers of {n}")
        if self.ranks % k or (n % k and k % n):
            raise ConfigError(
                f"{self.ranks} data-parallel ranks, {k} on a node, {n} a worker: allowed are whole nodes, "
                "and workers that are whole nodes or divide them"
            )

    @property
    def on_node(self) -> int:
        """k."""
        return min(self.ranks_per_node, self.ranks)

    @property
    def workers(self) -> int:
        """W."""
        return self.ranks // self.ranks_per_worker


@dataclass(frozen=True)
class Workload:
    """What is reduced in an optimizer step.

    With ZeRO-1 and ZeRO-2 all ranks own even shares of a bucket, or one, or a few, own all of it. With ZeRO-0
    and BF16_Optimizer nobody does: every rank needs the result.
    """

    parameters: float  # P
    grad_bytes: int  # b
    owners: Owners
    stock_bytes: int  # what b is without a block
    bucket: int = BUCKET  # elements
    tensors: int = 1000  # that P is made of
    copies: int = 0  # of the parameters, that extrapolation keeps
    reductions: int = 1  # in an optimizer step

    @property
    def num_bytes(self) -> float:
        """B."""
        return self.parameters * self.grad_bytes

    @property
    def to_all(self) -> bool:
        """Whether every rank needs the result."""
        return self.owners not in ("even", "one")

    @property
    def copied_bytes(self) -> float:
        """What DeepSpeed copies gradients into before it reduces them."""
        whole = self.owners == "BF16_Optimizer"  # all gradients of a parameter group
        return (self.parameters if whole else min(self.bucket, self.parameters)) * self.stock_bytes

    @property
    def buckets(self) -> int:
        """How many, at most full."""
        return math.ceil(self.parameters / self.bucket)


class CollectiveCost(NamedTuple):
    """One collective over all gradients."""

    sent: float  # bytes, by a rank
    leaving: float  # bytes, by a node


class Costs(NamedTuple):
    """Of an optimizer step, for a rank."""

    sent: float  # bytes
    leaving: float  # bytes that leave a node, from all of its ranks
    memory: float  # bytes besides parameters, gradients and optimizer states
    seconds: float


def all_reduce(num_bytes: float, cluster: Cluster) -> CollectiveCost:
    """A ring: 2 (D-1)/D B."""
    sent = 2 * (cluster.ranks - 1) / cluster.ranks * num_bytes
    return CollectiveCost(sent, _ring(sent, cluster))


def to_combiners(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """Inside a worker (n-1)/n B, across workers (W-1)/W B/n."""
    k, n, w = cluster.on_node, cluster.ranks_per_worker, cluster.workers
    inside = CollectiveCost((n - 1) / n * num_bytes, k * max(n - k, 0) / n * num_bytes)
    near = max(k // n, 1)  # workers on a rank's node, its own included
    across = CollectiveCost((w - 1) / w * num_bytes / n, k * (w - near) / w * num_bytes / n)
    return [hop for hop in (inside, across) if hop.sent]


def to_owners(num_bytes: float, cluster: Cluster) -> CollectiveCost:
    """Combined shares to the owners of a few pieces: (D-1)/D B/D."""
    d, k = cluster.ranks, cluster.on_node
    return CollectiveCost((d - 1) / d * num_bytes / d, k * (d - k) / d * num_bytes / d)


def to_everyone(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """Combined shares to all ranks, by rings: across workers (W-1)/W B/n, then inside (n-1)/n B."""
    d, k, n, w = cluster.ranks, cluster.on_node, cluster.ranks_per_worker, cluster.workers
    share = (w - 1) / w * num_bytes / n
    across = CollectiveCost(share, min(n, k) * share if d > k else 0.0)
    inside = (n - 1) / n * num_bytes
    return [hop for hop in (across, CollectiveCost(inside, inside if n > k else 0.0)) if hop.sent]


def inside_workers(num_bytes: float, cluster: Cluster) -> list[CollectiveCost]:
    """The mean of a worker's past gradients, on all of its ranks, by a ring: 2 (n-1)/n B."""
    sent = 2 * (cluster.ranks_per_worker - 1) / cluster.ranks_per_worker * num_bytes
    return [CollectiveCost(sent, sent if cluster.ranks_per_worker > cluster.on_node else 0.0)] if sent else []


def _ring(sent: float, cluster: Cluster) -> float:
    """A ring through all ranks leaves each node by one link."""
    return sent if cluster.ranks > cluster.on_node else 0.0


def stock_costs(job: Workload, cluster: Cluster) -> Costs:
    """DeepSpeed's own averaging: an all-reduce of a copy of the bucket."""
    num_bytes = job.parameters * job.stock_bytes
    hops = [all_reduce(num_bytes, cluster)] * job.reductions
    return _costs(hops, job.copied_bytes, 2 * num_bytes * job.reductions, 0.0, cluster)


def block_costs(block: GradmixConfig, job: Workload, cluster: Cluster) -> Costs:
    """A block's."""
    hops = gradient_hops(block, job, cluster)
    once = []
    if block.extrapolation is not None and block.extrapolation.needs_gradient:
        once = inside_workers(job.num_bytes, cluster)
    memory = job.copies * job.parameters * job.grad_bytes
    if not exchanges(block, cluster):
        memory += job.copied_bytes
        touched = 2 * job.num_bytes
        if choose_transport(block, cluster.workers) is not Transport.STOCK:
            memory += block.tile_bytes
            touched += 16 * job.parameters
        return _costs([*hops * job.reductions, *once], memory, touched * job.reductions, 0.0, cluster)
    memory += 3 * block.tile_bytes
    if job.owners == "ZeRO-0":
        memory += job.copied_bytes
    if job.to_all and block.decides_for_model:
        memory += 1.5 * block.tile_bytes * job.buckets  # that wait for the decision
    if _smooths(block):
        memory += 8 * job.parameters / cluster.ranks
    seconds, w = 0.0, cluster.workers
    if block.mixing.needs_gram:
        together = math.ceil(_decisions(block, job) / job.buckets)
        memory += _GRAM_COPIES * 8 * w * w * together
        seconds += 2 * w * job.parameters / cluster.ranks_per_worker / cluster.fp64_rate
        rounds = 1 if block.scope == "model" else job.buckets
        seconds += rounds * KERNELS_PER_WORKER * w * cluster.launch_s
    hops += _decision_hops(block, job, cluster)
    hops = [*hops * job.reductions, *once]
    touched = _touched(block, job, cluster) * job.reductions
    return _costs(hops, memory, touched, seconds * job.reductions, cluster)


def exchanges(block: GradmixConfig, cluster: Cluster) -> bool:
    """Whether gradients of all workers meet, or are weighed and summed by DeepSpeed."""
    return cluster.workers > 1 and block.exchanges


def gradient_hops(block: GradmixConfig, job: Workload, cluster: Cluster) -> list[CollectiveCost]:
    """What happens to the gradients themselves."""
    num_bytes = job.num_bytes
    if not exchanges(block, cluster):
        return [all_reduce(job.parameters * job.stock_bytes, cluster)]
    hops = to_combiners(num_bytes, cluster)
    if job.to_all:
        return hops + to_everyone(num_bytes, cluster)
    if block.decides_for_model:
        hops = hops * 2  # the first time for the decision alone
    if job.owners == "one":
        hops.append(to_owners((2 if _smooths(block) else 1) * num_bytes, cluster))
    return hops


def _decision_hops(block: GradmixConfig, job: Workload, cluster: Cluster) -> Iterator[CollectiveCost]:
    w = cluster.workers
    if block.mixing.needs_gram:
        told = 8.0 * _decisions(block, job) * (w * w + w + 2)
        yield CollectiveCost(told, _ring(told, cluster))
    if block.scaling is not None:
        yield all_reduce(16.0 * job.tensors, cluster)


def _decisions(block: GradmixConfig, job: Workload) -> int:
    """S."""
    return {"bucket": job.buckets, "parameter": job.tensors, "model": 1}[block.scope]


def _smooths(block: GradmixConfig) -> bool:
    return block.scaling is not None and block.scaling.factor_momentum > 0


def _touched(block: GradmixConfig, job: Workload, cluster: Cluster) -> float:
    """Bytes that operations on gradients read and write: of the P that a rank sends, and of the P/n that it
    combines.
    """
    b, n = job.grad_bytes, cluster.ranks_per_worker
    sends = 2.0 * b + (b if n > 1 else 0)
    combines = 16.0 + b if n > 1 else 0.0  # a worker's mean
    if block.mixing.needs_gram:
        combines += 16 + b + 4 * b  # products in float64; kept in the bucket, and read again
    combines += 44 + b if block.scaling is not None else 8 + b
    return job.parameters * (sends + combines / n)


def _costs(
    hops: Iterable[CollectiveCost], memory: float, touched: float, seconds: float, cluster: Cluster
) -> Costs:
    hops = list(hops)
    seconds += touched / cluster.memory_bandwidth
    for hop in hops:
        near = hop.sent - hop.leaving / cluster.on_node
        seconds += max(hop.leaving / cluster.node_bandwidth, near / cluster.link_bandwidth)
    return Costs(sum(hop.sent for hop in hops), sum(hop.leaving for hop in hops), memory, seconds)
