"""What Gram matrices say of workers: cosines between their gradients, and how far they agree."""

import torch
from torch import Tensor


def norms(gram_SWW: Tensor) -> Tensor:
    """The length of each gradient, `[S, W]`."""
    return gram_SWW.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(gram_SWW: Tensor) -> Tensor:
    """`cos(g_i, g_j)`, `[S, W, W]`; 0 with a zero gradient."""
    norms_SW = norms(gram_SWW)
    scale_SWW = norms_SW[..., :, None] * norms_SW[..., None, :]
    return torch.where(scale_SWW > 0, gram_SWW / scale_SWW, 0.0)


def mean_cosine(gram_SWW: Tensor) -> Tensor:
    """The mean of `cos(g_i, g_j)` over pairs of different workers, `[S]`; 0 with a zero gradient."""
    num_workers = gram_SWW.shape[-1]
    cosines_SWW = cosines(gram_SWW)
    pairs_S = cosines_SWW.sum((-2, -1)) - cosines_SWW.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs_S / max(num_workers * (num_workers - 1), 1)


def agreement(gram_SWW: Tensor) -> Tensor:
    """How far each worker's gradient points where the others' lead: `cos(g_i, sum_{j != i} h_j)`, `[S, W]`.

    `h_j = g_j min(1, median |g| / |g_j|)`, so that a long gradient counts no more than others. 0 where either
    is zero.
    """
    norms_SW = norms(gram_SWW)
    middle_S1 = median(norms_SW)[..., None]
    factors_SW = torch.where(norms_SW > middle_S1, middle_S1 / norms_SW, 1.0)
    num_workers = gram_SWW.shape[-1]
    others_WW = 1.0 - torch.eye(num_workers, dtype=gram_SWW.dtype, device=gram_SWW.device)
    clipped_SWW = gram_SWW * factors_SW[..., None, :]
    inner_SW = (clipped_SWW * others_WW).sum(-1)  # <g_i, sum_{j != i} h_j>
    clipped_SWW = clipped_SWW * factors_SW[..., :, None]  # <h_i, h_j>
    # |sum_{j != i} h_j|^2 = |sum_j h_j|^2 - 2 <h_i, sum_j h_j> + |h_i|^2
    rows_SW = clipped_SWW.sum(-1)
    own_SW = clipped_SWW.diagonal(dim1=-2, dim2=-1)
    squares_SW = rows_SW.sum(-1, keepdim=True) - 2 * rows_SW + own_SW
    scale_SW = norms_SW * squares_SW.clamp(min=0).sqrt()
    return torch.where(scale_SW > 0, inner_SW / scale_SW, 0.0).clamp(-1, 1)


def median(values_SW: Tensor, counted_SW: Tensor | None = None) -> Tensor:
    """The median along the last dimension, `[S]`, of those counted; the mean of the two in the middle. Inf if
    none is counted.
    """
    if counted_SW is None:
        sorted_SW, (num, half) = values_SW.sort(-1).values, divmod(values_SW.shape[-1], 2)
        return (sorted_SW[..., num - 1 + half] + sorted_SW[..., num]) / 2
    sorted_SW = torch.where(counted_SW, values_SW, float("inf")).sort(-1).values
    num_S1 = counted_SW.expand_as(sorted_SW).sum(-1, keepdim=True)
    low_S1, high_S1 = (sorted_SW.gather(-1, place.clamp(min=0)) for place in ((num_S1 - 1) // 2, num_S1 // 2))
    high_S1 = torch.where(num_S1 > 0, high_S1, low_S1)
    return (low_S1 + high_S1)[..., 0] / 2
