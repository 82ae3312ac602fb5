"""The gradients that rules are checked with, and how results are compared."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_gradmix.ops.segments import Segments

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = [7, 0, 40, 1, 23, 9]  # of parameters
NUM_ELEMENTS = sum(SIZES)
CUTS = [[1, 50, 29], [0, 47, 1, 32]]  # into tiles


def stacks() -> Mapping[str, Tensor]:
    """Gradients `[W, N]`, float64, such as rules meet, and such as they hope not to meet."""
    plain_WN = gaussian(4, 11)
    unused_N = torch.ones(NUM_ELEMENTS)
    unused_N[5:20] = 0.0
    first_N, second_N = gaussian(2, 12)
    return {
        "one worker": gaussian(1, 1),
        "two workers": gaussian(2, 2),
        "five workers": gaussian(5, 3),
        "40 workers": gaussian(40, 4),
        "unused coordinates": plain_WN * unused_N,
        "identical workers": plain_WN[:1].expand(4, -1).clone(),
        "all zero": torch.zeros_like(plain_WN),
        "a worker without gradient": torch.cat([torch.zeros_like(plain_WN[:1]), plain_WN]),
        "opposed workers": torch.stack([first_N, -first_N]),
        "workers that cancel": torch.stack([first_N, second_N, -first_N - second_N]),
        "a huge worker": torch.cat([plain_WN, plain_WN[:1] * 1e6]),
        "tiny gradients": plain_WN * 1e-40,
        "large gradients": plain_WN * 1e30,
    }


def in_dtype(grads_WN: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradients in a dtype, cut off where their sum would leave its range."""
    bound = torch.finfo(dtype).max / 64
    return grads_WN.clamp(-bound, bound).to(dtype)


def gaussian(num_workers: int, seed: int) -> Tensor:
    """A common part, and noise by worker."""
    random = generator(seed)
    common_N = torch.randn(NUM_ELEMENTS, generator=random, dtype=torch.float64)
    return 0.5 * common_N + torch.randn(num_workers, NUM_ELEMENTS, generator=random, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    """A random generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def segments(sizes: Sequence[int]) -> Segments:
    """Consecutive segments of these sizes."""
    return Segments(range(len(sizes)), sizes, len(sizes), torch.device("cpu"))


def require(kept: bool | Tensor, message: str) -> None:
    """Raise AssertionError unless it is kept."""
    if not kept:
        raise AssertionError(message)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-6, floor: float = 1e-9) -> bool:
    """Whether two results agree, but for a share of them, or less than the floor."""
    return torch.allclose(a, b, rtol=tolerance, atol=floor)
