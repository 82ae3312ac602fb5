from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round float32 values to `dtype`, up or down at random, so that the mean over many roundings is the
    value.

    An offset below half a unit in the last place, which rounding to nearest would always lose, is there on
    average. float32 is returned as it is; what is not finite, or beyond the range of `dtype`, is rounded to
    nearest.
    """
    if dtype == torch.float32:
        return values
    nearest = values.to(dtype)
    low = nearest.float()
    # The neighbour on the other side of the value: one step in the bits, which for finite floats are ordered.
    bits = nearest.view(torch.int16)
    away = (values.abs() > low.abs()).to(torch.int16) * 2 - 1
    zero = (low == 0) & (values != 0)
    tiny = torch.where(values < 0, -32767, 1).to(torch.int16)  # the smallest number of that sign
    high = torch.where(zero, tiny, bits + away).view(dtype)
    share = (values - low) / (high.float() - low)
    drawn = torch.empty_like(values).uniform_(generator=random) < share
    usable = (values != low) & high.isfinite() & nearest.isfinite()
    return torch.where(usable & drawn, high, nearest)
