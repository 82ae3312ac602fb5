"""What the formulas of model.py are given: a cluster, the gradients that it reduces, and what a gradmix block
does with them. Only the standard library is imported.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default with ZeRO, and its fixed size elsewhere

Owners = Literal["even", "one", "ZeRO-0", "BF16_Optimizer", "ZeRO-3"]


@dataclass(frozen=True)
class Cluster:
    """Data-parallel ranks and their networks; the defaults are nodes of 8 H100 with 400 Gbit/s for each.

    Raises ValueError if ranks do not fill workers and nodes, or if workers do not fit nodes.
    """

    ranks: int  # D
    ranks_per_node: int = 8  # of one data-parallel group
    ranks_per_worker: int = 1  # n
    node_bandwidth: float = 400e9  # bytes/s that a node sends
    link_bandwidth: float = 450e9  # bytes/s that a rank sends inside a node
    memory_bandwidth: float = 3.35e12  # bytes/s that a rank reads and writes
    fp64_rate: float = 67e12  # operations/s of a rank's float64 matrix products
    launch_s: float = 5e-6  # of a small kernel
    step_s: float = 0.3e-6  # of a step inside of a kernel that waits for the one before

    def __post_init__(self) -> None:
        n, k = self.ranks_per_worker, self.on_node
        if self.ranks % n:
            raise ValueError(f"{self.ranks} data-parallel ranks are no whole number of workers of {n}")
        if self.ranks % k or (n % k and k % n):
            raise ValueError(
                f"{self.ranks} data-parallel ranks, {k} on a node, {n} a worker: allowed are whole nodes, "
                "and workers that are whole nodes or divide them"
            )

    @property
    def on_node(self) -> int:
        """The data-parallel ranks on a node, k: those of `ranks_per_node` that there are."""
        return min(self.ranks_per_node, self.ranks)

    @property
    def workers(self) -> int:
        """The number of workers, W = D/n."""
        return self.ranks // self.ranks_per_worker


@dataclass(frozen=True)
class Workload:
    """The gradients that are reduced in an optimizer step.

    `owners` says who needs a bucket's result: with ZeRO-1 and ZeRO-2 all ranks own even shares of it, or one
    rank (or a few) owns all of it; with ZeRO-3 every rank owns an equal part of each parameter; with
    ZeRO-0 and BF16_Optimizer every rank needs the whole result.
    """

    parameters: float  # P
    grad_bytes: int  # b
    owners: Owners
    stock_bytes: int  # b where DeepSpeed averages
    bucket_elements: int = BUCKET_ELEMENTS
    tensors: int = 1000  # that the parameters consist of
    reductions: int = 1  # of all gradients, in an optimizer step

    @property
    def num_bytes(self) -> float:
        """The bytes of all gradients, B."""
        return self.parameters * self.grad_bytes

    @property
    def every_rank_needs_result(self) -> bool:
        """Whether buckets have no owners."""
        return self.owners not in ("even", "one", "ZeRO-3")

    @property
    def buckets(self) -> int:
        """How many buckets a reduction has if they are full."""
        return math.ceil(self.parameters / self.bucket_elements)


class RuleCost(NamedTuple):
    """What a rule adds to the costs of a reduction, for a given number of workers."""

    launches: float = 0.0  # small kernels, one after another, of the rank that decides, for each decision
    state_numbers: int = 0  # of a mixing rule, sent with each decision
    layer_terms: int = 0  # float64 that are summed over the ranks for each parameter tensor
    steps: float = 0.0  # of one program, one after another, of the rank that decides, for each decision
    bytes_per_element: float = 0.0  # read and written for every worker's gradient element


NO_COST = RuleCost()


@dataclass(frozen=True)
class ReductionPlan:
    """What a gradmix block does with the gradients: without arguments, nothing.

    `transport` is "stock" where DeepSpeed averages, "rescaled" where it averages gradients that each worker
    has multiplied before, "weighted" where it sums those that each has multiplied by its weight, and
    "exchange" where a rank receives all workers' gradients for its share, or all nodes' weighted sums of
    them. Only then can there be a scaling rule or momentum.
    """

    transport: str = "stock"
    scope: Literal["bucket", "parameter", "model"] = "bucket"
    needs_gram: bool = False  # weights depend on the Gram matrix of the workers' gradients
    by_node: bool = False  # an exchange is of weighted sums, taken inside of nodes first
    sketch_size: int = 0  # numbers of a sketch that it is taken from; 0 is from the gradients themselves
    needs_norms: bool = False  # weights depend on the lengths of the workers' gradients
    # Numbers of a sketch of each bucket from which the model's Gram matrix is observed after the step: 0 is
    # from the gradients themselves, None not at all, or from the matrices of the decisions.
    observed_sketch_size: int | None = None
    by_parameter: bool = False  # parameters have weights of their own
    mixing: RuleCost = NO_COST
    scaling: RuleCost | None = None  # None without a scaling rule
    has_momentum: bool = False  # its factors have a running mean
    averages_past_gradient: bool = False  # over a worker's ranks, for extrapolation
    parameter_copies: int = 0  # kept by extrapolation
    tile_bytes: int = 0

    @property
    def decides_for_model(self) -> bool:
        """Whether one decision needs the gradients of all buckets, and not only sketches of them."""
        return self.needs_gram and self.scope == "model" and not self.sketch_size

    def decisions(self, workload: Workload) -> int:
        """The number of decisions of a reduction, S."""
        return {"bucket": workload.buckets, "parameter": workload.tensors, "model": 1}[self.scope]

    def sketch_numbers(self, workload: Workload) -> float:
        """The float32 of all sketches of a reduction; what is smaller than one is sent as it is."""
        decisions = self.decisions(workload)
        return decisions * min(self.sketch_size, workload.parameters / decisions)
