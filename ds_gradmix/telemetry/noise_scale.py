"""The gradient noise scale: how many samples a batch has where noise and gradient are equally long.

McCandlish et al. 2018, arXiv 1812.06162, appendix A.1. Of W workers with b samples each, from the Gram matrix
of their gradients g_i, whose mean is m:

    trace_covariance  S = b (sum |g_i|^2 - W |m|^2) / (W - 1)     per sample, unbiased
    squared_gradient  |G|^2 = |m|^2 - S/(W b)                     unbiased, so it may be negative
    noise_scale       the ratio of their running means, in samples

It is a measure of how much workers' gradients differ, not a proof that a batch of that size is best: for
language models Merrill et al., arXiv 2505.23971, find that it does not predict the critical batch size.
"""

import torch
from torch import Tensor

DECAY = 0.95


def estimates(squares: Tensor, square_of_sum: Tensor, num_workers: int, samples: float) -> Tensor:
    """`trace_covariance` and `squared_gradient`, in the first dimension, from `sum |g_i|^2` and
    `|sum g_i|^2`, of any shape; `samples` is b, and there are at least two workers.
    """
    square_of_mean = square_of_sum / num_workers**2
    trace = samples * (squares - num_workers * square_of_mean) / (num_workers - 1)
    return torch.stack([trace, square_of_mean - trace / (num_workers * samples)])


class NoiseScale:
    """Running means of both, on the device; values that are not finite leave them as they are."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.sums = torch.zeros(3, *shape, dtype=torch.float64, device=device)  # both, and their weights' sum

    def add(self, estimates: Tensor) -> None:
        """Take in `estimates`, `[2, ...]`."""
        values = torch.cat([estimates, torch.ones_like(estimates[:1])])
        self.sums = torch.where(values.isfinite().all(0), DECAY * self.sums + (1 - DECAY) * values, self.sums)

    @property
    def means(self) -> Tensor:
        """The bias-corrected running means, `[2, ...]`; NaN before the first values."""
        return self.sums[:2] / self.sums[2]

    @property
    def value(self) -> Tensor:
        """The noise scale in samples; NaN where no gradient can be told from the noise."""
        trace, square = self.means
        return torch.where(square > 0, trace / square, float("nan"))
