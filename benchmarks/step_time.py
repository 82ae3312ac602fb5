"""Measures step times on 2 ranks: with each extrapolation rule against without one, with LAMB and LARS
against AdamW, or with telemetry and with Guard against the mean alone.

    python benchmarks/step_time.py [--optimizers | --telemetry] [--stage 2] [--dtype fp32] [--tokens 2048]

The model is a sequence of matrices, and the batch has as many tokens as that of a small language model on a
rank, so that a step computes about as much for each parameter as in training. Quote the median, since single
steps vary.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from cases import usual_blocks

RAW = argparse.RawDescriptionHelpFormatter


ADAMW: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": True}}
LAYERWISE = {name: {"type": name, "params": {"lr": 1e-4, "weight_decay": 0.01}} for name in ("Lamb", "LARS")}


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is compared, as parts of a ds_config; the first is what the others are compared with."""
    if options.telemetry:
        blocks: dict[str, dict[str, Any]] = {"mean": {}, "mean with telemetry": {"telemetry": {"every": 10}}}
        blocks["Guard"] = {"mixing": {"type": "Guard"}}
        blocks["mean once more"] = {}  # shows how far from 1 a ratio is by chance
        return {name: {"gradmix": block} for name, block in blocks.items()}
    if options.optimizers:
        return {"AdamW": {}, **{name: {"optimizer": section} for name, section in LAYERWISE.items()}}
    rules = {"none": {}, **usual_blocks("extrapolation")}
    return {name: {"gradmix": block} for name, block in rules.items()}


def build(options: argparse.Namespace, variant: dict[str, Any]) -> Any:
    """An engine of a variant."""
    import deepspeed

    import ds_gradmix

    ds_gradmix.enable()
    torch.manual_seed(0)
    width = options.width
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(options.depth)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": options.stage},
        **variant,
    }
    if options.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step_seconds(engine: Any, tokens: int, steps: int) -> tuple[float, float]:
    """The seconds of so many training steps on this rank, from a barrier on; and of the optimizer in them."""
    parameter = next(engine.parameters())
    x = torch.randn(tokens, parameter.shape[0]).to(parameter.dtype)
    torch.distributed.barrier()
    start, optimizer = time.perf_counter(), 0.0
    for _ in range(steps):
        engine.backward(engine(x).square().mean())
        middle = time.perf_counter()
        engine.step()
        optimizer += time.perf_counter() - middle
    return time.perf_counter() - start, optimizer


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    """Measure pairs of steps as a rank; rank 0 prints the result."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # or one would be compiled first
    deepspeed.init_distributed("gloo", verbose=False)
    engines = {name: build(options, variant) for name, variant in variants(options).items()}
    for engine in engines.values():
        step_seconds(engine, options.tokens, 1)
    rounds = [
        {name: step_seconds(engine, options.tokens, options.steps) for name, engine in engines.items()}
        for _ in range(options.rounds)
    ]
    first, *others = engines
    for name in others if rank == 0 else ():
        print(f"ZeRO-{options.stage}, {options.dtype}: {name} / {first}", end="")
        for part, what in enumerate(("step", "engine.step alone")):
            ratios = [seconds[name][part] / seconds[first][part] for seconds in rounds]
            quoted = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"; {what}: median {quoted}", end="")
        print(f"; {len(rounds)} pairs")
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself


def main() -> None:
    """Parse the options and start two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--optimizers", action="store_true", help="LAMB and LARS against torch's AdamW")
    parser.add_argument("--telemetry", action="store_true", help="telemetry and Guard against the mean")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="rows in a rank's batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="in a row, of each in a round")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    arguments = (parser.parse_args(), port)
    os.environ["OMP_NUM_THREADS"] = "1"
    # What ranks and their first engines need, imported once: they are forked.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
