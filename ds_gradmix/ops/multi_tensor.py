"""Operations on many tensors at once: NVIDIA apex's `amp_C` kernels where they can be imported, and
`torch._foreach_*` otherwise. The one place that decides.

apex is optional, and is not what PyPI calls `apex`: it is known by its extension `amp_C`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2048 * 32  # elements a block of amp_C's kernels works on
_DTYPES = (torch.float32, torch.float16)  # that all versions of amp_C have kernels for


@functools.cache
def amp_c() -> tuple[Any, str]:
    """apex's extension, or None, and why not."""
    try:
        return importlib.import_module("amp_C"), ""
    except ModuleNotFoundError:
        return None, "NVIDIA apex is not installed"
    except Exception as error:  # built for another torch, or another CUDA: it is optional
        return None, f"amp_C: {error}"


def describe() -> str:
    """Which kernels serve, in words."""
    module, why_not = amp_c()
    if module is None:
        return f"torch._foreach ({why_not})"
    return "amp_C of NVIDIA apex for float32 and float16 on CUDA, torch._foreach for the rest"


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each of P tensors, `[P]`, in float32 whatever their dtype."""
    module = _kernels(tensors)
    if module is not None:
        return torch.as_tensor(module.multi_tensor_l2norm(_CHUNK, _flag(tensors), [list(tensors)], True)[1])
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))


def axpby_(a: float, xs: Sequence[Tensor], b: float, ys: Sequence[Tensor]) -> None:
    """`y <- a x + b y` for each pair, in place; x may be of another dtype."""
    if not ys:
        return
    module = _kernels(xs, ys)
    if module is not None:
        module.multi_tensor_axpby(_CHUNK, _flag(ys), [list(xs), list(ys), list(ys)], a, b, -1)
        return
    if b != 1:
        torch._foreach_mul_(list(ys), b)
    torch._foreach_add_(list(ys), [x.to(y.dtype) for x, y in zip(xs, ys, strict=True)], alpha=a)


def _kernels(*lists: Sequence[Tensor]) -> Any:
    """amp_C, if it is there and takes these lists: it looks at the dtype of a list's first tensor alone, and
    counts elements in 32 bits.
    """
    for tensors in lists:
        if len({t.dtype for t in tensors}) != 1 or tensors[0].dtype not in _DTYPES:
            return None
        if not all(_is_cuda(t) and t.is_contiguous() and 0 < t.numel() < 2**31 for t in tensors):
            return None
    return amp_c()[0]


def _is_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _flag(tensors: Sequence[Tensor]) -> Tensor:
    """Where amp_C notes that something is not finite; the result has it, too."""
    return torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
