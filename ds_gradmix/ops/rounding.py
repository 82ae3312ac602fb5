from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round float32 values to `dtype`, up or down at random: the mean over many roundings is the value.

    An offset below half a unit in the last place, which rounding to nearest would always lose, is there on
    average. float32 is returned as it is; what is not finite stays so. `values` may be overwritten.
    """
    if dtype == torch.float32:
        return values
    if dtype == torch.bfloat16:
        return _to_bfloat16(values, random)
    return _to_neighbour(values, dtype, random)


def _to_bfloat16(values: Tensor, random: torch.Generator) -> Tensor:
    """bfloat16 is the upper half of a float32: add 16 random bits, and drop the lower half."""
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=random)  # 64 random bits, for four values
    lower = draws.view(torch.int16)[: values.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32).add_(lower.view_as(values)).bitwise_and_(-0x10000)
    return bits.view(torch.float32).to(torch.bfloat16)


def _to_neighbour(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Any 16-bit float: the nearest, or the next on the other side, in proportion to how near they are."""
    nearest = values.to(dtype)
    low = nearest.float()
    # One step in the bits is one unit in the last place, which for finite floats are ordered.
    bits = nearest.view(torch.int16)
    away = (values.abs() > low.abs()).to(torch.int16) * 2 - 1
    zero = (low == 0) & (values != 0)
    tiny = torch.where(values < 0, -32767, 1).to(torch.int16)  # the smallest number of that sign
    high = torch.where(zero, tiny, bits + away).view(dtype)
    share = (values - low) / (high.float() - low)
    drawn = torch.empty_like(values).uniform_(generator=random) < share
    usable = (values != low) & high.isfinite() & nearest.isfinite()
    return torch.where(usable & drawn, high, nearest)
