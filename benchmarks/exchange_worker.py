"""One rank of `exchange.py`: measures every case and writes FOLDER/rankN.json.

Bytes: the kernel's count of what this host's interface sent from before `engine.backward` to after it, which
is the reduction and nothing else (weights are gathered in `step`). Before each reading every rank has passed
a barrier and has waited, so nothing is under way; what the barriers cost is measured without a backward and
taken off.

Memory: in such a backward (`resident_memory.py`), as a whole, and in the reductions of a bucket; with a small
`tile_bytes`, which shows whether memory is bounded. Bytes and times have the block's default: small tiles are
small messages, to which headers add more. Time: whole steps of stock and rule by turns, so that whatever
slows this machine slows both.
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
import hosts
import torch
import torch.distributed as dist
from cases import DEEPSPEED_DTYPE, NUM_LAYERS, RULES, WIDTH, Case
from resident_memory import Watch, map_as_usual, map_every_block

SETTLE_S = 0.05
TIMEOUT = timedelta(seconds=90)


class Layers(torch.nn.Module):
    """Equal square matrices in a row, little to compute and much to exchange."""

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
    if RULES[rule] is not None:
        # Here and not above, so that stock can be measured where the package cannot be imported.
        import ds_gradmix

        ds_gradmix.enable()
    torch.manual_seed(0)
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    config = case.ds_config(rule, tile_bytes)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def make_inputs(case: Case) -> torch.Tensor:
    """Nearly the same on every rank: gradients agree, and no rule saves bytes by leaving a worker out."""
    common = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    own = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2 + dist.get_rank()))
    return (common + 0.3 * own).to(torch.bfloat16 if case.dtype in DEEPSPEED_DTYPE else torch.float32)


def step(engine: Any, inputs: torch.Tensor) -> None:
    engine.backward(engine(inputs))
    engine.step()


def sent_bytes(interface: str) -> int:
    """The interface's counter, at a moment when no rank has anything under way."""
    dist.barrier()
    time.sleep(SETTLE_S)
    return hosts.sent_bytes(interface)


def measure_bytes(engine: Any, inputs: torch.Tensor, repeats: int) -> list[int]:
    """What the backward of a step sends, without what looking at it sends."""
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
    """What the backward of a step allocates, after one step to warm up."""
    step(engine, inputs)
    watch, results = Watch(), []
    home, name = engine.optimizer, "average_tensor"
    if not hasattr(home, name):  # every rank needs the result, and the engine reduces
        home, name = engine, "allreduce_bucket"
    reduce = getattr(home, name)
    setattr(home, name, watch.piece(reduce))
    for _ in range(repeats):
        loss = engine(inputs)
        dist.barrier()
        with watch:
            engine.backward(loss)
        engine.step()
        results.append((watch.whole_bytes, watch.piece_bytes))
    setattr(home, name, reduce)
    whole, pieces = zip(*results, strict=True)
    return {"backward_bytes": list(whole), "reduction_bytes": list(pieces)}


def measure_times(stock: Any, engine: Any, inputs: torch.Tensor, rounds: int) -> list[list[float]]:
    """Seconds of a step of [stock, engine] in each round; who goes first takes turns."""
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
    """An engine, which gives back its memory after the block."""
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
    """What was found by case and rule: memory first, then times (`resident_memory.py`) and bytes."""
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
    """All of it, in the environment of a rank."""
    # Compiles for half a minute an operator that only inference uses, and only between ranks of one host.
    # (By name: as an attribute, `deepspeed.comm.torch` is PyTorch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", timeout=TIMEOUT, auto_mpi_discovery=False)
    results = measure(plan)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
