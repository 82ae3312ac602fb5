"""The table in docs/scaling.md, from the formulas. `python tests/scaling_table.py` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ds_gradmix.config import parse_block
from ds_gradmix.cost_tables import job_of
from ds_gradmix.costs import Cluster, Costs, block_costs, stock_costs

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- table: written by tests/scaling_table.py -->\n", "<!-- end of table -->"
CONFIG: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
GAF = {"mixing": {"type": "GAF"}}
VRGD = {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}}
BLOCKS: dict[str, dict[str, Any]] = {
    "stock, Mean": {},
    "GAF": GAF,
    "GAF, worker node": {**GAF, "worker": "node"},
    "GAF, VRGD with momentum, worker node": {**GAF, **VRGD, "worker": "node"},
}
SIZES = {"7B": 7e9, "70B": 70e9, "1T": 1e12}
RANKS = (64, 512, 4096)
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


def rows() -> Iterator[Row]:
    for size, parameters in SIZES.items():
        for ranks in RANKS:
            for rule, definition in BLOCKS.items():
                block = parse_block(definition)
                cluster = Cluster(ranks, RANKS_PER_NODE, RANKS_PER_NODE if block.worker == "node" else 1)
                job = job_of(CONFIG, block, parameters, 1000)
                found = block_costs(block, job, cluster) if definition else stock_costs(job, cluster)
                yield Row(size, ranks, rule, found)


def table() -> str:
    head = "| parameters | ranks | block | GB sent per rank | GB leaving a node | GB of memory | seconds |"
    return "\n".join([head, "|---" * 7 + "|", *map(str, rows())]) + "\n"


def written(text: str) -> str:
    """The document with the table of now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
