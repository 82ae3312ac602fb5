"""Triton programs for what would take many launches otherwise; Triton is there wherever torch has CUDA."""

import functools
import importlib.util

import torch


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the programs run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
