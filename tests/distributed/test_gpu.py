"""What only a GPU shows; deselected where there is none. Two ranks share it over gloo, for NCCL would want
two GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradmix import combine
from ds_gradmix.ops.segments import Segments
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.optim import Lamb, Lars
from ds_gradmix.rules import GAF, RngKey
from ds_gradmix.rules.apply import mix
from tests.support.engines import build_with
from tests.support.gradients import MIN_WORKERS, NASTY, RULES, SIZES, gaussian
from tests.support.ranks import run_ranks
from tests.support.solo import BLOCKS, OWNERS, reduce_bucket
from tests.support.training import weights_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combine_on_cuda_equals_cpu(name: str, dtype: torch.dtype) -> None:
    grads = gaussian(8, seed=5).to(dtype)
    combined, info = combine(grads, RULES[name], sizes=SIZES)
    on_gpu, gpu_info = combine(grads.cuda(), RULES[name], sizes=SIZES)
    assert on_gpu.is_cuda and on_gpu.dtype == dtype
    # Gram matrices of both are off by up to 2e-7
    torch.testing.assert_close(gpu_info["weights"].cpu(), info["weights"], rtol=1e-5, atol=1e-6)
    # the order of float32 sums over 8 workers, then one rounding to dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(on_gpu.cpu(), combined, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs_on_cuda(name: str) -> None:
    for rule, config in RULES.items():
        if 1 < len(NASTY[name]) < MIN_WORKERS.get(rule, 0):
            continue
        combined, _ = combine(NASTY[name].cuda(), config)
        assert combined.isfinite().all()


def test_inner_products_are_not_tf32() -> None:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        test_combine_on_cuda_equals_cpu("gaf vrgd", torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_programs_equal_the_cpu(dtype: torch.dtype) -> None:
    """Each Triton program against what a CPU computes."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(8, 300_001, generator=generator).to(dtype)
    ends: list[list[torch.Tensor]] = []
    for device in ("cpu", "cuda"):
        own, found = rows.to(device), []
        for size in (1000, 2**17):
            sketch = SketchMaps(size, RngKey(1, 2).generator, own.device).of_length(rows.shape[1])
            found.append(torch.empty(size, device=device))
            sketch.of(own[0].tensor_split([100_000, 100_001]), found[-1])
        weights_W1 = torch.linspace(0, 1, 8, device=device)[:, None]
        found.append(mix(own, weights_W1, Segments([0], [rows.shape[1]], 1, own.device)))
        for merge in ("mean", "midpoint"):
            grads = torch.randn(40, 50, generator=torch.Generator().manual_seed(2)).double()
            gram, present = (
                (grads @ grads.t())[None].to(device),
                torch.ones(40, dtype=torch.bool, device=device),
            )
            present[3] = False
            considered = GAF(merge=merge).consider(
                gram, present, RngKey(1, 2), torch.zeros(0, 40, device=device)
            )
            found += [considered.decision.weights_SW, considered.decision.agreed_S, considered.margin_S]
        ends.append([values.cpu() for values in found])
    for on_cpu, on_cuda in zip(*ends, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-4)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_no_host_synchronisation(name: str, owners: str) -> None:
    """Also in the first reduction, which plans: its tables go to the device without waiting."""
    block = {**BLOCKS[name], "tile_bytes": 2**20}
    for warm_up in (False, True):
        flat = torch.randn(8 * 100_000, device="cuda")
        reduce_bucket(
            block, [100_000] * 8, OWNERS[owners], flat, warm_up=warm_up, around=no_synchronisation()
        )


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_optimizers_on_cuda_equal_cpu_and_do_not_wait(kind: type) -> None:
    shapes, ends = [(300, 40), (40,), (7, 3), (2000, 1000)], []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        optimizer = kind(params, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            with no_synchronisation() if device == "cuda" else contextlib.nullcontext():
                optimizer.step()
        ends.append([p.detach().cpu() for p in params])
    for on_cpu, on_cuda in zip(*ends, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-6)


def train_fp16(block: dict[str, Any], zero: dict[str, Any], dtype: str, overflow: bool) -> dict[str, Any]:
    torch.cuda.set_device(0)
    precision = {"enabled": True}
    if dtype == "fp16":
        precision |= {"initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}
    engine = build_with({"gradmix": block, dtype: precision, "zero_optimization": zero})
    rank = torch.distributed.get_rank()
    scales = []
    for step in range(6):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(64, 13, generator=generator).to("cuda", next(engine.parameters()).dtype)
        if overflow and step == 2 and rank == 1:
            x[0, 0] = float("inf")
        engine.backward((engine(x).float() ** 2).mean())
        engine.step()
        scales.append((engine.optimizer.loss_scale, engine.skipped_steps))
    return {"weights": weights_of(engine), "scales": scales}


@pytest.mark.parametrize("name", ["gaf", "gaf by parameter", "vrgd", "gradientmix", "momentum"])
def test_fp16_overflow(name: str) -> None:
    for rank in run_ranks(2, train_fp16, BLOCKS[name], {"stage": 2}, "fp16", True):
        assert rank["scales"] == [(256.0, 0)] * 2 + [(128.0, 1)] * 4
        assert all(np.isfinite(w).all() for w in rank["weights"].values())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["gaf", "vrgd", "momentum", "gradientmix"])
def test_overlap_comm_changes_nothing(name: str, stage: int) -> None:
    block = {**BLOCKS[name], "tile_bytes": 4096}
    runs = [
        run_ranks(
            2,
            train_fp16,
            block,
            {"stage": stage, "reduce_bucket_size": 700, "overlap_comm": on},
            "bf16",
            False,
        )
        for on in (False, True)
    ]
    for plain, overlapped in zip(*runs, strict=True):
        np.testing.assert_equal(overlapped["weights"], plain["weights"])
