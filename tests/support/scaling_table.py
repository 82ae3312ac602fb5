"""The tables of docs/scaling.md, from the formulas. `python -m tests.support.documents` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.cases import usual_blocks
from ds_gradmix.config import SLOTS, parse_block
from ds_gradmix.costs.model import Cluster, Costs, block_costs
from ds_gradmix.costs.report import reduction_plan, workload_of

CONFIG: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
GAF = {"mixing": {"type": "GAF"}}
VRGD = {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}}
PAST = {"extrapolation": {"type": "PastGradient", "params": {"lr": 0.1}}}


SKETCH = {"gram": {"sketch": 2**20}}
BY_EXCHANGE = {"transport": "exchange"}
BLOCKS: dict[str, dict[str, Any]] = {
    "stock": {},
    # What TorchJD's solvers take on the host, the formulas do not know.
    **{name: block for name, block in usual_blocks(*SLOTS).items() if name != "TorchJD"},
    "GAF, scope parameter": {**GAF, "scope": "parameter"},
    "GAF, scope model, ZeRO-1": {**GAF, "scope": "model"},
    "GAF by sketch": {**GAF, **SKETCH},
    "GAF by sketch and exchange": {**GAF, **SKETCH, **BY_EXCHANGE},
    "GAF by sketch, scope parameter": {**GAF, **SKETCH, "scope": "parameter"},
    "GAF by sketch, scope model, ZeRO-1": {**GAF, **SKETCH, "scope": "model"},
    "GAF by sketch and exchange, scope model, ZeRO-1": {**GAF, **SKETCH, **BY_EXCHANGE, "scope": "model"},
    "Mean by exchange": BY_EXCHANGE,
    "GAF, VRGD": {**GAF, "scaling": {"type": "VRGD"}},
    "VRGD with momentum": VRGD,
    "GAF, PastGradient": {**GAF, **PAST},
    "GAF, worker node": {**GAF, "worker": "node"},
    "GAF, scope parameter, worker node": {**GAF, "scope": "parameter", "worker": "node"},
    "GAF, scope model, ZeRO-1, worker node": {**GAF, "scope": "model", "worker": "node"},
    "VRGD, worker node": {"scaling": {"type": "VRGD"}, "worker": "node"},
    "GAF, VRGD with momentum, worker node": {**GAF, **VRGD, "worker": "node"},
    "GAF, PastGradient, worker node": {**GAF, **PAST, "worker": "node"},
    "GAF, worker 2": {**GAF, "worker": 2},
    "GAF, worker 32": {**GAF, "worker": 32},
}
AT_ALL_SIZES = (
    "stock",
    "GAF",
    "GAF by sketch",
    "GAF by sketch and exchange",
    "GAF by sketch, scope model, ZeRO-1",
    "GAF by sketch and exchange, scope model, ZeRO-1",
    "GAF, worker node",
    "GAF, VRGD with momentum, worker node",
)
SIZES = {"7B": 7e9, "70B": 70e9, "1T": 1e12}
RANKS = (64, 512, 4096)
IN_DETAIL = ("70B", 512)
RANKS_PER_NODE = 8


class Row(NamedTuple):
    size: str
    ranks: int
    rule: str
    costs: Costs

    def __str__(self) -> str:
        c = self.costs
        numbers = [f"{value:.4g}" for value in (c.sent / 1e9, c.leaving / 1e9, c.memory / 1e9, c.seconds)]
        return "| " + " | ".join([self.size, str(self.ranks), self.rule, *numbers]) + " |"


def config_of(rule: str) -> dict[str, Any]:
    """The ds_config of a row."""
    stage = 1 if "ZeRO-1" in rule else 2
    return {**CONFIG, "zero_optimization": {"stage": stage}, "gradmix": BLOCKS[rule]}


def row_of(size: str, ranks: int, rule: str) -> Row:
    block = parse_block(BLOCKS[rule])
    per_worker = {"rank": 1, "node": RANKS_PER_NODE}.get(str(block.worker), block.worker)
    cluster = Cluster(ranks, RANKS_PER_NODE, int(per_worker))
    plan = reduction_plan(config_of(rule), block, cluster.workers)
    workload = workload_of(config_of(rule), SIZES[size], 1000)
    return Row(size, ranks, rule, block_costs(plan, workload, cluster))


def rows() -> Iterator[Row]:
    """All rules at one size, then a few rules at all sizes."""
    for rule in BLOCKS:
        yield row_of(*IN_DETAIL, rule)
    for size in SIZES:
        for ranks in RANKS:
            for rule in AT_ALL_SIZES:
                yield row_of(size, ranks, rule)


def table() -> str:
    head = "| parameters | ranks | block | GB sent per rank | GB leaving a node | GB of memory | seconds |"
    head += "\n" + "|---" * 7 + "|"
    lines = list(map(str, rows()))
    return "\n".join([head, *lines[: len(BLOCKS)], "", head, *lines[len(BLOCKS) :]]) + "\n"
