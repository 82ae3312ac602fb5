"""Measures the arithmetic of an exchange as multiples of copying its input, on one CPU thread.

    python benchmarks/arithmetic.py [--workers 8] [--columns 1048576]

The input is `[W, C]`, every worker's gradient for a rank's share. Each operation takes turns with a copy of
the input into memory that is there already; the median of the ratios is printed, with the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # ds_gradmix of this checkout, installed or not

import torch
from torch import Tensor

from ds_gradmix.ops.segments import Segments
from ds_gradmix.rules import VRGD, AndMask
from ds_gradmix.rules.apply import mix, scaling_statistics

TENSORS = 64  # parameters in the share, where they are told apart
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operations(grads_WC: Tensor) -> Mapping[str, Callable[[], object]]:
    """What is measured."""
    w, columns = grads_WC.shape
    whole = Segments([0], [columns], 1, grads_WC.device, w)
    sizes = [columns // TENSORS] * (TENSORS - 1)
    sizes.append(columns - sum(sizes))
    by_param = Segments(range(TENSORS), sizes, TENSORS, grads_WC.device, w)
    weights_W1 = torch.full((w, 1), 1 / w)
    return {
        "Gram matrix": lambda: whole.gram(grads_WC),
        "Gram matrices by parameter": lambda: by_param.gram(grads_WC),
        "weighted mean": lambda: mix(grads_WC, weights_W1, whole),
        "VRGD, statistics": lambda: scaling_statistics(VRGD(), grads_WC, weights_W1, whole),
        "AndMask, statistics": lambda: scaling_statistics(AndMask(), grads_WC, weights_W1, whole),
    }


def seconds(operation: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--columns", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for workers in options.workers:
        for name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(workers)
            grads_WC = torch.randn(workers, options.columns, generator=generator).to(dtype)
            target_WC = torch.empty_like(grads_WC)
            print(f"\n{workers} workers, {name}, {options.columns} columns: times copying the input")
            for what, operation in operations(grads_WC).items():
                ratios = []
                copying = partial(target_WC.copy_, grads_WC)
                for _ in range(options.rounds + 1):
                    copy = seconds(copying)
                    ratios.append(seconds(operation) / copy)
                ratios = ratios[1:]  # the first makes what is kept
                quoted = f"{statistics.median(ratios):6.2f}   ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"{what:<30}{quoted}")


if __name__ == "__main__":
    main()
