"""Universal checkpoints of ZeRO-3: another number of ranks goes on as with stock DeepSpeed, with rules that
here do what the mean does; their state starts afresh.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.blocks import noise
from tests.support.engines import log_lines
from tests.support.ranks import run_ranks
from tests.support.training import build, relative, train, weights_of
from tests.support.zero3 import IN_PARTS, Outer, stage3, to_universal

TELEMETRY: dict[str, Any] = {"mixing": {"type": "Guard"}, "telemetry": True}
BLOCKS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "mean": {},
    "guard": TELEMETRY,
    "noise": noise(std=0.0),
    "momentum": {"scaling": {"type": "VRGD", "params": {"momentum": 0.9, "gamma": 1.0}}},
}
CASES = {name: stage3(block, optimizer="Adam", zero=IN_PARTS) for name, block in BLOCKS.items()}


def before_the_change(folder: str) -> None:
    """Three ranks train and save."""
    for name, case in CASES.items():
        engine = build(case, Outer(None))
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"universal_checkpoint_info": {}})
        torch.distributed.barrier()


def after_the_change(folder: str) -> dict[str, Any]:
    """As many ranks as there are now: load, and go on."""
    found = {}
    for name, case in CASES.items():
        engine = build(replace(case, config={"checkpoint": {"load_universal": True}}), Outer(None))
        with log_lines() as lines:
            assert engine.load_checkpoint(f"{folder}/{name}", tag="universal")[0] is not None
        loaded = weights_of(engine)
        train(engine, case, 3, 6)
        found[name] = {"loaded": loaded, "end": weights_of(engine), "lines": list(lines)}
    return found


def test_fewer_ranks_go_on_from_a_universal_checkpoint(tmp_path: Path) -> None:
    run_ranks(3, before_the_change, str(tmp_path))
    for name in CASES:
        to_universal(tmp_path / name)
    for rank, found in enumerate(run_ranks(2, after_the_change, str(tmp_path))):
        for name in CASES:
            for at in ("loaded", "end"):
                assert relative(found[name][at], found["stock"][at]) < 1e-6, (name, at)
            told = ["a universal checkpoint does not hold it" in line for line in found[name]["lines"]]
            assert told == [True] * (rank == 0 and name != "stock")
