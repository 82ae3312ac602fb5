"""The cases and rules that exchange.py compares, with the expected bytes and the bounds.

In a case all ranks own even shares of a bucket ("even"), one rank owns all of it ("one owner"), every rank
needs the result ("every rank"), or every rank owns a slice of each parameter ("slices": ZeRO-3). The expected
bytes are those of `ds_gradmix check`: docs/scaling.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # ds_gradmix of this checkout, installed or not

from ds_gradmix.config import SLOTS, GradmixConfig, for_stage, parse_block
from ds_gradmix.costs.model import Cluster, Workload, block_costs
from ds_gradmix.costs.report import reduction_plan

NUM_LAYERS, WIDTH = 32, 512
NUM_ELEMENTS = NUM_LAYERS * WIDTH * WIDTH
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_optimization": {"stage": 0}},
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    "BF16_Optimizer": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    # All parameters stay gathered, so that nothing but the reduction communicates in a backward.
    "ZeRO-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**9}},
}
EVERY_RANK, SLICES = "every rank", "slices"
# Engines with one kind of ownership, and their dtypes.
ENGINES_OF_ONE_KIND = {
    "ZeRO-0": (EVERY_RANK, ("fp32",)),
    "BF16_Optimizer": (EVERY_RANK, ("bf16",)),
    "ZeRO-3": (SLICES, ("fp32", "bf16")),
}
DEEPSPEED_DTYPE = {"bf16": {"bf16": {"enabled": True}}}

_GAF = {"mixing": {"type": "GAF", "params": {"threshold": 1.0}}}
_VRGD = {"scaling": {"type": "VRGD", "params": {"gamma": 0.1}}}
_SKETCH = {"gram": {"sketch": 2**15}}
_BY_EXCHANGE = {"transport": "exchange"}
_VRGD_MOMENTUM = {"scaling": {"type": "VRGD", "params": {"gamma": 0.1, "momentum": 0.9}}}


def usual_blocks(*slots: str) -> dict[str, dict[str, Any]]:
    """A block for each of our rules of some slots, with the params of its first example."""
    rules = [(slot, usual) for slot in slots for rule in SLOTS[slot].known for usual in rule.examples()[:1]]
    return {
        rule.type_name(): {slot: {"type": rule.type_name(), "params": rule.model_dump(exclude_none=True)}}
        for slot, rule in rules
    }


# None is stock DeepSpeed, compared with a second stock engine: it shows how far from 1 a ratio is by chance.
RULES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    **usual_blocks("mixing", "scaling"),
    "GAF+VRGD": _GAF | _VRGD,
    "VRGD momentum 0.9": _VRGD_MOMENTUM,
    "GAF scope parameter": _GAF | {"scope": "parameter"},
    "GAF scope model": _GAF | {"scope": "model"},
    "GAF by sketch": _GAF | _SKETCH,
    "GAF by sketch and exchange": _GAF | _SKETCH | _BY_EXCHANGE,
    "Mean by exchange": _BY_EXCHANGE,
}
# Measured between hosts of several ranks only.
RULES_WITH_LARGE_WORKERS: dict[str, dict[str, Any]] = {
    f"{name}, worker node": {**(RULES[name] or {}), "worker": "node"}
    for name in ("GradientMix", "GAF", "VRGD", "VRGD momentum 0.9", "GAF scope model")
}
RULES_WITH_LARGE_WORKERS["GAF, worker 4"] = {**_GAF, "worker": 4}
RULES |= RULES_WITH_LARGE_WORKERS
QUICK_RULES = {"ZeRO-2": ("GAF", "GAF+VRGD"), "ZeRO-0": ("GAF scope model",)}
MODEL_SCOPE = "GAF scope model"


@dataclass(frozen=True)
class Case:
    """An engine configuration for a model of equal `WIDTH` × `WIDTH` matrices, and the rules to measure."""

    owners: str
    dtype: str
    engine: str
    world: int
    tile_bytes: int
    rules: tuple[str, ...]
    ranks_per_host: int = 1

    @property
    def bucket_elements(self) -> int:
        """All of the model, or half of an owner's partition."""
        return NUM_ELEMENTS // (2 * self.world if self.owners == "one owner" else 1)

    @property
    def bucket_bytes(self) -> int:
        """The size of a bucket."""
        return self.bucket_elements * ELEMENT_BYTES[self.dtype]

    @property
    def model_bytes(self) -> int:
        """The size of all gradients."""
        return NUM_ELEMENTS * ELEMENT_BYTES[self.dtype]

    def ds_config(self, rule: str, tile_bytes: int | None) -> dict[str, Any]:
        """The ds_config: DeepSpeed's defaults except for what defines the case, and `tile_bytes` if given."""
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 1_000_000,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            **ENGINES[self.engine],
            "zero_optimization": {
                **ENGINES[self.engine]["zero_optimization"],
                "reduce_bucket_size": self.bucket_elements,
                "overlap_comm": False,
            },
            **DEEPSPEED_DTYPE.get(self.dtype, {}),
        }
        block = RULES[rule]
        if block is None:
            return config
        return config | {"gradmix": block if tile_bytes is None else block | {"tile_bytes": tile_bytes}}

    def block(self, rule: str) -> GradmixConfig:
        """The rule's block, with the defaults of the engine's stage."""
        return for_stage(parse_block(RULES[rule] or {}), ENGINES[self.engine]["zero_optimization"]["stage"])

    def theory_bytes(self, rule: str) -> float:
        """The expected bytes that a host sends in one reduction of all gradients."""
        definition = RULES[rule] or {}
        width = ELEMENT_BYTES[self.dtype]
        owners: Any = {"even": "even", "one owner": "one"}.get(self.owners, self.engine)
        workload = Workload(NUM_ELEMENTS, width, owners, width, self.bucket_elements, NUM_LAYERS)
        worker = definition.get("worker", 1)
        per_worker = self.ranks_per_host if worker == "node" else worker
        cluster = Cluster(self.world, self.ranks_per_host, per_worker)
        plan = reduction_plan(self.ds_config(rule, None), self.block(rule), cluster.workers)
        return block_costs(plan, workload, cluster).leaving

    def gloo_bytes(self, rule: str) -> float:
        """The same over gloo, whose reduce-scatter (ZeRO-3's) sends as much as an all-reduce."""
        plan = reduction_plan(self.ds_config(rule, None), self.block(rule), self.world)
        by_deepspeed = self.engine == "ZeRO-3" and plan.transport != "exchange"
        return self.theory_bytes(rule) + (self.theory_bytes("stock") if by_deepspeed else 0)

    def bytes_bound(self, rule: str) -> float:
        """The most that a rule may send, relative to stock: 5 % more than expected, for headers."""
        return 1.05 * self.theory_bytes(rule) / self.theory_bytes("stock")

    def memory_bound(self, rule: str, stock_reduction_bytes: float) -> float:
        """The most that a reduction may allocate: three tiles, or as much as stock where stock reduces; and
        before, for a sketch, what docs/scaling.md says.

        With ZeRO-0 DeepSpeed copies the gradients into a bucket besides. The new state of a momentum is kept
        separately until the end of a step, which may still be skipped: one float32 for each element that the
        rank owns.
        """
        copied = self.bucket_bytes if self.engine == "ZeRO-0" else 0
        plan = reduction_plan(self.ds_config(rule, None), self.block(rule), self.world)
        base = copied + 3 * self.tile_bytes if plan.transport == "exchange" else stock_reduction_bytes
        pending = 4 * NUM_ELEMENTS // self.world if plan.has_momentum else 0
        return base + pending + 16 * plan.sketch_size + (2 << 20)
