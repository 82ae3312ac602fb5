"""What a block costs, from formulas: bytes on the wire and extra memory per rank, against stock DeepSpeed.

For a bucket of B bytes and W workers, per rank and reduction (exchange.py tells where they come from):

    stock all-reduce              2 (W-1)/W B
    exchange, even buckets          (W-1)/W B
    exchange, one owner             (W-1)/W B (1 + h/W)
    exchange, result to all       2 (W-1)/W B
    Gram pass of scope "model"      (W-1)/W B more, unless the result goes to all

with h = 1, or 2 where the factors travel with the mean (momentum). Buckets are even, or have one owner, under
ZeRO-1 and ZeRO-2; under ZeRO-0 and BF16_Optimizer nobody owns one, and all ranks need the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_gradmix.config import Block
from ds_gradmix.engines.support import lookup
from ds_gradmix.extrapolation import Extrapolation
from ds_gradmix.mixing import Mean

_BUCKET = 500_000_000  # elements of a bucket: DeepSpeed's default in ZeRO, and the size elsewhere


def sent_ratio(block: Block, num_workers: int, *, one_owner: bool = False, to_all: bool = False) -> float:
    """Bytes a rank sends for a bucket, as a multiple of what stock DeepSpeed's all-reduce sends."""
    if num_workers == 1 or to_all or not (block.mixing.needs_gram or block.scaling is not None):
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
    kind = _engine_without_owners(config)
    if kind is not None:
        lines.append(f"  workers  buckets of {kind}")
        for size in workers:
            lines.append(f"  {size:7d}  {sent_ratio(block, size, to_all=True):{11 + len(kind)}.3f}")
    else:
        lines.append("  workers  even buckets  one owner a bucket")
        for size in workers:
            even, uneven = (sent_ratio(block, size, one_owner=one) for one in (False, True))
            lines.append(f"  {size:7d}  {even:12.3f}  {uneven:18.3f}")
    bucket = _BUCKET
    if kind is None:
        bucket = int(lookup(config, "zero_optimization.reduce_bucket_size", bucket))
    width = 2 if any(lookup(config, f"{name}.enabled", False) is True for name in ("bf16", "fp16")) else 4
    stock = f"stock: a copy of the bucket, at most {bucket * width / 2**20:g} MiB"
    if kind == "ZeRO-0":
        stock += " and a parameter"
    if kind == "BF16_Optimizer":
        stock = "stock: a copy in bf16 of all gradients of a parameter group"
    if exchanges:
        tiles = f"{3 * block.tile_bytes / 2**20:g} MiB, 3 tiles"
        tiles += " besides stock's" if kind == "ZeRO-0" else ""
        lines.append(f"extra memory per rank while a bucket is reduced: at most {tiles} ({stock})")
        if kind is not None and block.mixing.needs_gram and block.scope == "model":
            lines.append("  and 1.5 tiles for every bucket that waits for the decision on the model")
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
        name = "reduce_bucket_size" if kind is None else "DeepSpeed's own bucket size"
        lines.append(f"note: scope bucket makes {name} ({bucket:g} elements) part of the mathematics")
    return "\n".join(lines)


def _engine_without_owners(config: Mapping[str, Any]) -> str | None:
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
