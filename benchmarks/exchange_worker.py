"""One rank of `exchange.py`: `exchange_worker.py PLAN.json FOLDER` measures every case and writes FOLDER/rankN.json.

Each rule's engine is compared with a stock engine of the same model that lives beside it in the same process.

Bytes: the kernel's count of what this host's interface sent from before `engine.backward` to after it, which in stage
1 and 2 is the reduction and nothing else (weights are gathered in `step`). Before each reading every rank has passed a
barrier and has waited, so nothing is under way; what the barriers cost is measured without a backward and taken off.

Time: whole steps, in blocks of stock and rule by turns, so that whatever slows this machine slows both.
Memory: see `tensor_memory.py`; over forward and backward of a step, and inside the optimizer's reductions of a bucket.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm.torch
import tensor_memory
import torch
import torch.distributed as dist
from cases import DEEPSPEED_DTYPE, NUM_LAYERS, RULES, WIDTH, Case

SETTLE_S = 0.05
TIMEOUT = timedelta(seconds=90)


class Layers(torch.nn.Module):
    """Equal square matrices in a row, little to compute and much to exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, inputs_BD: torch.Tensor) -> torch.Tensor:
        hidden_BD = inputs_BD
        for layer in self.layers:
            hidden_BD = hidden_BD + 0.1 * layer(hidden_BD)
        return hidden_BD.float().square().mean()


def build_engine(case: Case, rule: str) -> Any:
    torch.manual_seed(0)
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.ds_config(rule))
    return engine


def make_inputs(case: Case) -> torch.Tensor:
    """Nearly the same on every rank: gradients that agree, so that no rule saves bytes by leaving a worker out."""
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
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def bytes_sent_by(function: Callable[[], object], interface: str) -> int:
    before = sent_bytes(interface)
    function()
    return sent_bytes(interface) - before


def measure_bytes(engine: Any, inputs: torch.Tensor, interface: str, repeats: int) -> list[int]:
    """Bytes sent in the backward of each of `repeats` steps, without what looking at them costs."""
    results = []
    for _ in range(repeats):
        loss = engine(inputs)
        idle = bytes_sent_by(lambda: None, interface)
        results.append(bytes_sent_by(lambda loss=loss: engine.backward(loss), interface) - idle)
        engine.step()
    return results


def measure_memory(engine: Any, inputs: torch.Tensor, repeats: int) -> dict[str, int]:
    """The median over `repeats` steps of what forward and backward allocated at their peak."""
    optimizer, peaks = engine.optimizer, []
    optimizer.average_tensor = tensor_memory.marked(optimizer.average_tensor)
    for _ in range(repeats):
        peaks.append(asdict(tensor_memory.measure(lambda: engine.backward(engine(inputs)))))
        engine.step()
    del optimizer.average_tensor
    return {name: int(statistics.median(peak[name] for peak in peaks)) for name in peaks[0]}


def measure_times(stock: Any, engine: Any, inputs: torch.Tensor, rounds: int, steps: int) -> list[list[float]]:
    """Seconds per step of [stock, engine] in each round; who goes first takes turns."""
    results = []
    for round_index in range(rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if round_index % 2 == 0 else (1, 0):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step((stock, engine)[which], inputs)
            dist.barrier()
            seconds[which] = (time.perf_counter() - start) / steps
        results.append(seconds)
    return results


def measure_case(case: Case, plan: dict[str, Any]) -> dict[str, Any]:
    inputs, interface = make_inputs(case), os.environ["GLOO_SOCKET_IFNAME"]
    stock = build_engine(case, "stock")
    step(stock, inputs)

    def bytes_and_memory(engine: Any) -> dict[str, Any]:
        return {
            "sent_bytes": measure_bytes(engine, inputs, interface, plan["repeats"]),
            **measure_memory(engine, inputs, plan["repeats"]),
        }

    results: dict[str, Any] = {"reference": bytes_and_memory(stock)}
    for rule in case.rules:
        if RULES[rule] is not None:
            import ds_gradmix

            ds_gradmix.enable()
        engine = build_engine(case, rule)
        step(engine, inputs)
        results[rule] = bytes_and_memory(engine)
        results[rule]["seconds"] = measure_times(stock, engine, inputs, plan["rounds"], plan["steps"])
        engine.destroy()
        del engine
        gc.collect()
    stock.destroy()
    return results


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    # Compiles for half a minute an operator that only inference uses, and only between ranks of one host.
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", timeout=TIMEOUT, auto_mpi_discovery=False)
    results = [measure_case(Case(**case), plan) for case in plan["cases"]]
    Path(sys.argv[2], f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
