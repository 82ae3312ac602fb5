"""One rank of `exchange.py`: it measures every case and writes FOLDER/rankN.json.

Bytes: the kernel's counter of what the host's interface has sent, read before and after `engine.backward`,
which communicates nothing but the reduction (weights are gathered in `step`). Before each reading all ranks
pass a barrier and wait, so that nothing is in flight; the bytes of a barrier are measured without a backward
and subtracted.

Memory (`resident_memory.py`): the peak of such a backward, and of the reductions of a bucket in it, with a
small `tile_bytes`, which shows that memory is bounded. Bytes and times are measured with the default, since
small tiles are small messages with relatively more headers. Time: full steps of stock and of the rule in
turn, so that load on this machine slows both.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # the first engine would, for seconds on every rank
import hosts
import torch
import torch.distributed as dist
from cases import DEEPSPEED_DTYPE, NUM_LAYERS, RULES, WIDTH, Case
from resident_memory import Watch, map_as_usual, map_every_block

SETTLE_S = 0.05
TIMEOUT = timedelta(seconds=90)


class Layers(torch.nn.Module):
    """A sequence of equal square matrices: little to compute, and much to exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)
        )

    def forward(self, inputs_BD: torch.Tensor) -> torch.Tensor:
        hidden_BD = inputs_BD
        for layer in self.layers:
            hidden_BD = hidden_BD + 0.1 * layer(hidden_BD)
        return hidden_BD.float().square().mean()


def build_engine(case: Case, rule: str, tile_bytes: int | None) -> Any:
    """An engine with the rule, or without a block for stock."""
    if RULES[rule] is not None:
        # Imported here, so that stock can be measured where the package cannot be imported.
        import ds_gradmix

        ds_gradmix.enable()
    torch.manual_seed(0)
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    config = case.ds_config(rule, tile_bytes)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def make_inputs(case: Case) -> torch.Tensor:
    """Similar inputs on every rank, so that gradients agree and no rule leaves a worker out."""
    common = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    own = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2 + dist.get_rank()))
    return (common + 0.3 * own).to(torch.bfloat16 if case.dtype in DEEPSPEED_DTYPE else torch.float32)


def step(engine: Any, inputs: torch.Tensor) -> None:
    """Take a training step."""
    engine.backward(engine(inputs))
    engine.step()


def sent_bytes(interface: str) -> int:
    """The interface's counter while no rank communicates."""
    dist.barrier()
    time.sleep(SETTLE_S)
    return hosts.sent_bytes(interface)


def measure_bytes(engine: Any, inputs: torch.Tensor, repeats: int) -> list[int]:
    """The bytes that the backward of a step sends, without those of the measurement."""
    interface, results = os.environ["GLOO_SOCKET_IFNAME"], []
    for _ in range(repeats):
        loss = engine(inputs)
        readings = [sent_bytes(interface), sent_bytes(interface)]
        engine.backward(loss)
        readings.append(sent_bytes(interface))
        engine.step()
        idle = readings[1] - readings[0]
        results.append(readings[2] - readings[1] - idle)
    return results


def measure_memory(engine: Any, inputs: torch.Tensor, repeats: int) -> dict[str, list[int]]:
    """The bytes that the backward of a step allocates at its peak, after one step to warm up."""
    step(engine, inputs)
    watch, results = Watch(), []
    owner, name = engine.optimizer, "average_tensor"
    if engine.zero_optimization_stage() == 3:
        name = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    elif not hasattr(owner, name):  # every rank needs the result, and the engine reduces
        owner, name = engine, "buffered_allreduce_fallback"
    reduce = getattr(owner, name)
    setattr(owner, name, watch.call(reduce))
    for _ in range(repeats):
        loss = engine(inputs)
        dist.barrier()
        with watch:
            engine.backward(loss)
        engine.step()
        results.append((watch.block_bytes, watch.call_bytes))
    setattr(owner, name, reduce)
    backwards, reductions = zip(*results, strict=True)
    return {"backward_bytes": list(backwards), "reduction_bytes": list(reductions)}


def measure_times(stock: Any, engine: Any, inputs: torch.Tensor, rounds: int) -> list[list[float]]:
    """The seconds of a step of [stock, engine] in each round; the two take turns in going first."""
    results = []
    step(engine, inputs)
    for round_index in range(rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if round_index % 2 == 0 else (1, 0):
            dist.barrier()
            start = time.perf_counter()
            step((stock, engine)[which], inputs)
            dist.barrier()
            seconds[which] = time.perf_counter() - start
        results.append(seconds)
    return results


@contextmanager
def running(case: Case, rule: str, tile_bytes: int | None = None) -> Iterator[Any]:
    """An engine whose memory is released after the block."""
    engine = build_engine(case, rule, tile_bytes)
    yield engine
    engine.destroy()
    del engine
    gc.collect()


def memory_of(case: Case, repeats: int) -> dict[str, dict[str, Any]]:
    """`measure_memory` of stock, under "reference", and of each rule."""
    inputs, results = make_inputs(case), {}
    for name, rule in [("reference", "stock"), *((rule, rule) for rule in case.rules)]:
        with running(case, rule, case.tile_bytes) as engine:
            results[name] = measure_memory(engine, inputs, repeats)
    return results


def times_and_bytes_of(case: Case, rounds: int, repeats: int) -> dict[str, dict[str, Any]]:
    """`measure_times` of each rule against a stock engine beside it, and `measure_bytes` of both."""
    inputs, results = make_inputs(case), {}
    with running(case, "stock") as stock:
        step(stock, inputs)
        results["reference"] = {"sent_bytes": measure_bytes(stock, inputs, repeats)}
        for rule in case.rules:
            with running(case, rule) as engine:
                seconds = measure_times(stock, engine, inputs, rounds)  # the first step is not measured
                results[rule] = {"seconds": seconds, "sent_bytes": measure_bytes(engine, inputs, repeats)}
    return results


def measure(plan: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The measurements of each case by rule: first memory, then times and bytes (`resident_memory.py`)."""
    cases = [Case(**case) for case in plan["cases"]]
    results: list[dict[str, dict[str, Any]]] = [{} for _ in cases]
    if plan["rounds"]:
        map_every_block()
        results = [memory_of(case, plan["repeats"]) for case in cases]
        map_as_usual()
    for case, result in zip(cases, results, strict=True):
        for rule, found in times_and_bytes_of(case, plan["rounds"], plan["repeats"]).items():
            result.setdefault(rule, {}).update(found)
    return results


def work(plan: dict[str, Any], folder: Path) -> None:
    """Run as a rank, in the environment of a rank: measure, and write the results."""
    # Compiling this operator takes half a minute, and only inference uses it, between ranks of one host.
    # (Imported by name, since the attribute `deepspeed.comm.torch` is PyTorch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", timeout=TIMEOUT, auto_mpi_discovery=False)
    results = measure(plan)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
