"""What a block costs, from formulas: bytes on the wire and extra memory per rank, against stock DeepSpeed.

For a bucket of B bytes and W workers, per rank and reduction (exchange.py tells where they come from):

    stock all-reduce              2 (W-1)/W B
    exchange, even buckets          (W-1)/W B
    exchange, one owner             (W-1)/W B (1 + h/W)
    Gram pass of scope "model"      (W-1)/W B more

with h = 1, or 2 where the factors travel with the mean (momentum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_gradmix.config import Block
from ds_gradmix.engines.support import lookup
from ds_gradmix.extrapolation import Extrapolation
from ds_gradmix.mixing import Mean


def sent_ratio(block: Block, num_workers: int, *, one_owner: bool) -> float:
    """Bytes a rank sends for a bucket, as a multiple of what stock DeepSpeed's all-reduce sends."""
    if num_workers == 1 or not (block.mixing.needs_gram or block.scaling is not None):
        return 1.0
    hops = 2 if block.scaling is not None and block.scaling.smoothing > 0 else 1
    ratio = 0.5 * (1 + (hops / num_workers if one_owner else 0.0))
    if block.mixing.needs_gram and block.scope == "model":
        ratio += 0.5
    return ratio


def cost_table(config: Mapping[str, Any], block: Block, workers: Sequence[int]) -> str:
    """The costs in words and numbers, for several data-parallel sizes."""
    exchanges = block.mixing.needs_gram or block.scaling is not None
    lines = ["gradients sent per rank and reduction, relative to stock DeepSpeed:"]
    lines.append("  workers  even buckets  one owner a bucket")
    for size in workers:
        even, uneven = (sent_ratio(block, size, one_owner=one) for one in (False, True))
        lines.append(f"  {size:7d}  {even:12.3f}  {uneven:18.3f}")
    bucket = int(lookup(config, "zero_optimization.reduce_bucket_size", 500_000_000))
    width = 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4
    stock = f"stock: a copy of the bucket, at most {bucket * width / 2**20:g} MiB"
    if exchanges:
        tiles = 3 * block.tile_bytes / 2**20
        lines.append(
            f"extra memory per rank while a bucket is reduced: at most {tiles:g} MiB, 3 tiles ({stock})"
        )
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
            "  and for momentum 4 bytes per parameter / W throughout, as much again during reductions"
        )
    if block.extrapolation is not None:
        lines.append(_extrapolation_line(config, block.extrapolation, width))
    if block.mixing.needs_gram and block.scope == "bucket":
        lines.append(
            f"note: scope bucket makes reduce_bucket_size ({bucket:g} elements) part of the mathematics"
        )
    return "\n".join(lines)


def _extrapolation_line(config: Mapping[str, Any], rule: Extrapolation, width: int) -> str:
    words, copies = "one copy", 1
    if rule.needs_gradient and lookup(config, "zero_optimization.stage", 0) == 2:
        if lookup(config, "gradient_accumulation_steps", 1) not in (1, None):
            words, copies = "two copies", 2
        elif "gradient_accumulation_steps" not in config and "train_batch_size" in config:
            words += " (two if DeepSpeed comes to accumulate gradients)"
    return (
        f"extra memory per rank for {type(rule).__name__}: {words} of the parameters in their own dtype "
        f"({copies * width} bytes a parameter); no communication"
    )
