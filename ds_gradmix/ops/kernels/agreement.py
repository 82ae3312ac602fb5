"""Filtering by agreement (ops/agreement.py) in one launch: a program a segment, a step a worker."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def filter_by_agreement(
    gram_SWW: Tensor,
    present_W: Tensor,
    order_W: Tensor,
    least_cosine: float,
    tolerance: float,
    midpoint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[S, W]`, whether anybody agreed `[S]`, and margins `[S]`, from Gram matrices in float64.

    Args:
        gram_SWW: contiguous.
        present_W: bool.
        order_W: in which workers are taken, int32.
        least_cosine, tolerance, midpoint: as in `AgreementFilter`.
    """
    num_segments, num_workers, _ = gram_SWW.shape
    weights_SW = gram_SWW.new_empty(num_segments, num_workers)
    agreed_S = present_W.new_empty(num_segments)
    margins_S = gram_SWW.new_empty(num_segments)
    block = max(triton.next_power_of_2(num_workers), 16)
    _filter[(num_segments,)](
        gram_SWW,
        present_W.view(torch.uint8),
        order_W,
        weights_SW,
        agreed_S.view(torch.uint8),
        margins_S,
        num_workers,
        LEAST_COSINE=least_cosine,
        TOLERANCE=tolerance,
        MIDPOINT=midpoint,
        BLOCK=block,
        num_warps=min(max(block // 128, 1), 16),
    )
    return weights_SW, agreed_S, margins_S


@triton.jit
def _filter(
    gram, present, order, weights, agreed, margins, num_workers,
    LEAST_COSINE: tl.constexpr, TOLERANCE: tl.constexpr, MIDPOINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < num_workers
    gram += tl.program_id(0).to(tl.int64) * num_workers * num_workers
    share = tl.zeros([BLOCK], dtype=tl.float64)
    dots = tl.zeros([BLOCK], dtype=tl.float64)  # <a, g_j>
    squared = tl.zeros([], dtype=tl.float64)  # <a, a>
    margin = tl.zeros([], dtype=tl.float64) + float("inf")
    met = tl.zeros([], dtype=tl.int32)  # workers present so far
    num_kept = tl.zeros([], dtype=tl.int32)
    for k in range(num_workers):
        i = tl.load(order + k)
        row = tl.load(gram + i * num_workers + columns, mask=inside, other=0.0)
        own = tl.load(gram + i * num_workers + i)
        norm = tl.sqrt(tl.maximum(own, 0.0))
        is_present = tl.load(present + i) != 0
        dot = tl.sum(tl.where(columns == i, dots, 0.0))
        cosine_times_length = tl.where(norm > 0, dot / norm, 0.0)
        length = tl.where(squared > 0, tl.sqrt(tl.maximum(squared, 0.0)), 1e150)
        agrees = cosine_times_length >= (LEAST_COSINE - TOLERANCE) * length
        is_first = met == 0
        kept = is_present & (is_first | agrees)
        distance = tl.abs(cosine_times_length / length - LEAST_COSINE)
        margin = tl.where(is_present & (met > 0) & (distance < margin), distance, margin)
        met += is_present.to(tl.int32)
        num_kept += kept.to(tl.int32)
        half = tl.where(kept, 0.5 if MIDPOINT else 1.0, 0.0)
        half = tl.where(is_present & is_first, 1.0, half)
        rest = tl.where(half == 0.5, 0.5, 1.0)
        squared = rest * rest * squared + half * (2.0 * rest * dot + half * own)
        dots = rest * dots + half * row
        share = rest * share + tl.where(columns == i, half, 0.0)
    total = tl.sum(share)
    share /= tl.where(total > 0.5, total, 0.5)
    tl.store(weights + tl.program_id(0) * num_workers + columns, share, mask=inside)
    tl.store(agreed + tl.program_id(0), (met > 0) & (num_kept > tl.minimum(met, 2) - 1))
    tl.store(margins + tl.program_id(0), margin)
