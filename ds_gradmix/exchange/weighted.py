"""Weights that are known before the gradients travel: each worker multiplies what it sends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_gradmix.exchange.bucket import ParamSpan, runs_of
from ds_gradmix.ops.segments import Segments


def multiply(flat_N: Tensor, spans: Sequence[ParamSpan], weights_S: Tensor | float, tile_bytes: int) -> None:
    """Multiply gradients by this worker's weights, in place and in one pass.

    Args:
        flat_N: the bucket.
        spans: the gradients in it.
        weights_S: one number, or a tensor of one weight, or of one for each span.
        tile_bytes: what a chunk in float32, with its weights, may take.
    """
    first = 0
    for begin, length, run in runs_of(spans):
        part = flat_N.narrow(0, begin, length)
        if isinstance(weights_S, float):
            part.mul_(weights_S)
            continue
        own_S = weights_S if len(weights_S) == 1 else weights_S[first : first + len(run)]
        place = 0
        for chunk in part.split(tile_bytes // 8):
            segments = Segments([0], [chunk.numel()], 1, flat_N.device)
            if len(own_S) > 1:
                segments = _window([span.length for span in run], place, chunk.numel(), flat_N.device)
            chunk.copy_(chunk.float().mul_(segments.expand(own_S[None])[0]))
            place += chunk.numel()
        first += len(run)


def _window(lengths: Sequence[int], begin: int, length: int, device: torch.device) -> Segments:
    """Segments of the columns `[begin, begin + length)` of parameters of the given lengths."""
    runs: list[int] = []
    place = 0
    for size in lengths:
        runs.append(max(min(place + size, begin + length) - max(place, begin), 0))
        place += size
    return Segments(list(range(len(lengths))), runs, len(lengths), device)
