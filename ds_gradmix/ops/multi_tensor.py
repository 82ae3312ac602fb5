"""Operations on many tensors at once: by NVIDIA apex's `amp_C` kernels where they can be imported and take
the tensors, and by `torch._foreach_*` otherwise. (PyPI's `apex` is another project.)
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK_SIZE = 2048 * 32  # elements that a thread block of amp_C's kernels works on
_DTYPES = (torch.float32, torch.float16)  # that all versions of amp_C have kernels for


@functools.cache
def amp_c() -> tuple[Any, str]:
    """apex's extension and an empty string, or None and the reason why it cannot be used."""
    try:
        return importlib.import_module("amp_C"), ""
    except ModuleNotFoundError:
        return None, "NVIDIA apex is not installed"
    except Exception as error:  # apex built for another torch or CUDA must not end the training
        return None, f"amp_C: {error}"


def describe() -> str:
    """The kernels that are used, for `ds_gradmix env`."""
    module, why_not = amp_c()
    if module is None:
        return f"torch._foreach ({why_not})"
    return "amp_C of NVIDIA apex for float32 and float16 on CUDA, torch._foreach for the rest"


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each of P tensors, `[P]`, in float32 whatever their dtype."""
    if (module := _usable_amp_c(tensors)) is not None:
        found = module.multi_tensor_l2norm(_CHUNK_SIZE, _overflow_flag(tensors), [list(tensors)], True)
        return torch.as_tensor(found[1])
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each of P tensors, `[P]`, float64: of every finite one it is finite."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)).square()


def axpby_(a: float, xs: Sequence[Tensor], b: float, ys: Sequence[Tensor]) -> None:
    """`y <- a x + b y` for each pair, in place; x may be of another dtype."""
    if not ys:
        return
    if (module := _usable_amp_c(xs, ys)) is not None:
        lists = [list(xs), list(ys), list(ys)]
        module.multi_tensor_axpby(_CHUNK_SIZE, _overflow_flag(ys), lists, a, b, -1)
        return
    if b != 1:
        torch._foreach_mul_(list(ys), b)
    torch._foreach_add_(list(ys), [x.to(y.dtype) for x, y in zip(xs, ys, strict=True)], alpha=a)


def _usable_amp_c(*lists: Sequence[Tensor]) -> Any:
    """amp_C, or None for lists that it cannot take: of several dtypes, or elements over int32."""
    for tensors in lists:
        if len({t.dtype for t in tensors}) != 1 or tensors[0].dtype not in _DTYPES:
            return None
        if not all(_is_cuda(t) and t.is_contiguous() and 0 < t.numel() < 2**31 for t in tensors):
            return None
    return amp_c()[0]


def _is_cuda(tensor: Tensor) -> bool:  # replaced by a test
    return tensor.is_cuda


def _overflow_flag(tensors: Sequence[Tensor]) -> Tensor:
    """amp_C writes here whether a value is not finite; nobody reads it, since the result shows it as well."""
    return torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
