import torch
from torch import Tensor


def round_stochastically(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round float32 values to `dtype`, up or down at random, so that the expected result is the value.

    An offset below half a unit in the last place, which rounding to nearest would always lose, is kept on
    average. float32 is returned unchanged; what is not finite stays so. `values` may be overwritten.
    """
    if dtype == torch.float32:
        return values
    return _to_bfloat16(values, random) if dtype == torch.bfloat16 else _to_adjacent(values, dtype, random)


def _to_bfloat16(values: Tensor, random: torch.Generator) -> Tensor:
    """bfloat16 is the upper half of a float32: add 16 random bits, and drop the lower half."""
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=random)  # 64 random bits, for four values
    lower_bits = draws.view(torch.int16)[: values.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32).add_(lower_bits.view_as(values)).bitwise_and_(-0x10000)
    return bits.view(torch.float32).to(torch.bfloat16)


def _to_adjacent(values: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Any 16-bit float: one of the two numbers around the value, in proportion to how near it is."""
    nearest = values.to(dtype)
    rounded = nearest.float()
    # Finite floats are ordered as their bits are, so the adjacent number is one step of the bits away.
    step = (values.abs() > rounded.abs()).to(torch.int16) * 2 - 1
    from_zero = (rounded == 0) & (values != 0)
    smallest = torch.where(values < 0, -32767, 1).to(torch.int16)  # bits of the smallest of that sign
    other = torch.where(from_zero, smallest, nearest.view(torch.int16) + step).view(dtype)
    probability = (values - rounded) / (other.float() - rounded)
    drawn = torch.empty_like(values).uniform_(generator=random) < probability
    rounds = (values != rounded) & other.isfinite() & nearest.isfinite()
    return torch.where(rounds & drawn, other, nearest)
