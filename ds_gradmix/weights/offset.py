"""The offset of a stretch of one worker's weights, by an extrapolation rule."""

import hashlib

import torch
from torch import Tensor

from ds_gradmix.ops.rounding import round_stochastically
from ds_gradmix.rules import Extrapolation


def seed_of(key: tuple[int, int], step: int, label: str) -> int:
    """Seeds what is drawn for a stretch of memory: from the seed and number of the worker, step and label."""
    words = ",".join(map(str, (*key, step, label)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def moved(
    rule: Extrapolation, weights: Tensor, past: Tensor, scale: float | Tensor, random: torch.Generator
) -> Tensor:
    """`weights + scale * direction(past)`, in the dtype of the weights."""
    # A product and a sum, each rounded by itself: equal elements stay equal wherever they lie.
    values = rule.direction(past, random).float().mul(scale).add_(weights)
    if weights.dtype == torch.float16:  # where a sum of scaled gradients may have left the range
        values = torch.where(values.isfinite(), values, weights.float())
    return round_stochastically(values, weights.dtype, random)
