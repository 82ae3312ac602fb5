"""Measures the arithmetic of an exchange as multiples of copying its input, on one CPU thread.

    python benchmarks/arithmetic.py [--workers 8] [--columns 1048576]

The input is `[W, C]`, every worker's gradient for a rank's share; to a sketch it is one gradient of W C
elements, of which it makes C numbers. GAF's decisions are compared with copying their Gram matrix. Each
operation takes turns with a copy of its input into memory that is there already; the median of the ratios is
printed, with the least and the most.
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

from ds_gradmix.ops.gram import gram
from ds_gradmix.ops.segments import Segments
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.rules import GAF, VRGD, AndMask, RngKey
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
    flat_N, sketch_M = grads_WC.flatten(), torch.empty(columns)
    maps = SketchMaps(columns, RngKey(1, 2).generator, grads_WC.device)
    sketch = maps.of_length(len(flat_N))
    return {
        "sketch": lambda: sketch.of([flat_N], sketch_M),
        "sketch, signs (once a step)": lambda: SketchMaps(columns, RngKey(1, 2).generator, grads_WC.device),
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


def print_ratios(
    what: str, operation: Callable[[], object], copying: Callable[[], object], rounds: int
) -> None:
    """The median of the ratios, the least and the most."""
    ratios = []
    for _ in range(rounds + 1):
        copy = seconds(copying)
        ratios.append(seconds(operation) / copy)
    ratios = ratios[1:]  # the first makes what is kept
    quoted = f"{statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{what:<30}{quoted}")


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
                print_ratios(what, operation, partial(target_WC.copy_, grads_WC), options.rounds)
    print("\nGAF's decision: times copying the Gram matrix, float64")
    for workers in (8, 64, 512):
        grads_WC = torch.randn(workers, 4096) + 0.3 * torch.randn(4096)
        gram_WW, present_W = gram(grads_WC), torch.ones(workers, dtype=torch.bool)
        decide = partial(GAF().decide, gram_WW[None], present_W, RngKey(1, 2))
        copying = partial(torch.empty_like(gram_WW).copy_, gram_WW)
        print_ratios(f"{workers} workers", decide, copying, options.rounds)


if __name__ == "__main__":
    main()
