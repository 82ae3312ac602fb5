"""Measures the time that each extrapolation rule takes: steps of engines with it and without, on 2 ranks.

The model is a sequence of matrices, and the batch has as many tokens as that of a small language model on a
rank, so that a step computes about as much for each parameter as in training. Quote the median, since single
steps vary.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from cases import usual_blocks

RAW = argparse.RawDescriptionHelpFormatter


def build(width: int, depth: int, block: dict[str, Any], stage: int, dtype: str) -> Any:
    """An engine with a gradmix block."""
    import deepspeed

    import ds_gradmix

    ds_gradmix.enable()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradmix": block,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step_seconds(engine: Any, tokens: int) -> float:
    """The seconds of a training step on this rank, from a barrier on."""
    parameter = next(engine.parameters())
    x = torch.randn(tokens, parameter.shape[0]).to(parameter.dtype)
    torch.distributed.barrier()
    start = time.perf_counter()
    engine.backward(engine(x).square().mean())
    engine.step()
    return time.perf_counter() - start


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    """Measure pairs of steps as a rank; rank 0 prints the result."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    deepspeed.init_distributed("gloo", verbose=False)
    shape = (options.width, options.depth)
    blocks = {"none": {}, **usual_blocks("extrapolation")}
    engines = {name: build(*shape, block, options.stage, options.dtype) for name, block in blocks.items()}
    for engine in engines.values():
        step_seconds(engine, options.tokens)
    steps = [
        {name: step_seconds(engine, options.tokens) for name, engine in engines.items()}
        for _ in range(options.rounds)
    ]
    for name in [name for name in engines if name != "none"] if rank == 0 else []:
        ratios = [seconds[name] / seconds["none"] for seconds in steps]
        print(
            f"ZeRO-{options.stage}, {options.dtype}: step with {name} / without: median "
            f"{statistics.median(ratios):.3f} of {len(ratios)} pairs ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    torch.distributed.destroy_process_group()


def main() -> None:
    """Parse the options and start two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="rows in a rank's batch")
    parser.add_argument("--rounds", type=int, default=15)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.spawn(rank_main, (parser.parse_args(), port), nprocs=2)


if __name__ == "__main__":
    main()
