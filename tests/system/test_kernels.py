"""The Triton programs in Triton's interpreter, on a CPU, against what a CPU computes without them.

Triton is not among the requirements of the tests, since it takes 700 MB: `pip install triton` to run these.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import numpy as np
import torch

from ds_gradmix.ops.agreement import AgreementFilter
from ds_gradmix.ops.kernels.agreement import filter_by_agreement
from ds_gradmix.ops.kernels.sketch import add_to_sketch
from ds_gradmix.ops.kernels.weighted_sum import weighted_sum
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.rules import RngKey

CPU = torch.device("cpu")
random = torch.Generator().manual_seed(1)
for size, lengths, dtype in (
    (1000, [5000, 1, 333, 2500], torch.float32), (512, [2048], torch.bfloat16), (64, [9000], torch.float16)
):
    sketch = SketchMaps(size, RngKey(1, 2).generator, CPU).of_length(sum(lengths))
    parts = [torch.randn(length, generator=random).to(dtype) for length in lengths]
    wanted, found, begin = torch.empty(size), torch.zeros(size), 0
    sketch.of(parts, wanted)
    shifts, signs = torch.tensor(sketch._shifts, dtype=torch.int32), torch.tensor(sketch._block_signs)
    for part in parts:
        add_to_sketch(part, begin, shifts, signs, sketch._signs_M, found)
        begin += len(part)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
for rows, columns, dtype in ((3, 5000, torch.bfloat16), (8, 1024, torch.float32), (2, 1, torch.float16)):
    values = torch.randn(rows, columns, generator=random).to(dtype)
    weights = torch.rand(rows, generator=random)
    torch.testing.assert_close(weighted_sum(values, weights), weights @ values.float(), rtol=1e-5, atol=1e-5)
for case in range(120):
    workers, segments = (1, 2, 3, 5, 8, 16, 33)[case % 7], 1 + 2 * (case % 2)
    grads = torch.randn(segments, workers, 50, generator=random).double()
    grads += (0, 0.1, 0.5)[case % 3] * torch.randn(segments, 1, 50, generator=random)
    if case % 5 == 0:
        grads[:, case % workers] = 0
    present = torch.rand(workers, generator=random) >= (0, 0.3, 1)[case % 4 // 2]
    order, least = np.random.default_rng(case).permutation(workers), 1 - (0, 0.3, 0.97, 1.0, 2.0)[case % 5]
    gram, midpoint = (grads @ grads.transpose(1, 2)).contiguous(), case % 4 == 0
    wanted = AgreementFilter(least, 1e-6, midpoint)(gram, present, order)
    found = filter_by_agreement(gram, present, torch.from_numpy(order).int(), least, 1e-6, midpoint)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_programs_equal_what_they_replace(tmp_path: Path) -> None:
    """In a process of its own, since the interpreter has to be asked for before Triton is imported."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(tmp_path / "program.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert run.stdout.strip() == "equal", run.stderr
