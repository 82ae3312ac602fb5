"""tests/deepspeed_suite on a made-up checkout: the block is in engines of started processes, and a test that
ends otherwise with it is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As DeepSpeed's tests do it: ranks are a pool of the fork server, started by a function of unit.common.
COMMON = """
import os
import torch
import torch.multiprocessing as mp

def on_ranks(function, world=2):
    mp.set_start_method("forkserver", force=True)
    with mp.Pool(processes=world) as pool:
        return pool.starmap(rank_of, [(function, rank, world, os.environ["PORT"]) for rank in range(world)])

def rank_of(function, rank, world, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import deepspeed
    deepspeed.init_distributed("gloo")
    return function()
"""
TESTS = """
import functools
import deepspeed
import torch
from unit.common import on_ranks

def built(stage):
    model = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
              "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

def steps():
    engine = built(2)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return engine.global_steps, hasattr(engine.optimizer, "gradmix"), deepspeed.__file__

@functools.cache
def results():
    return on_ranks(steps)

def test_steps():
    for steps_taken, _, _ in results():
        assert steps_taken == 1

def test_that_fails_with_a_block():
    assert not any(has_block for _, has_block, _ in results())

def test_that_always_fails():
    assert False

def test_of_the_installed_deepspeed():
    assert all("fake" not in file for _, _, file in results())
"""


@pytest.mark.timeout(280)
def test_a_difference_is_told(tmp_path: Path) -> None:
    from tests.support.ranks import free_port

    unit = tmp_path / "fake" / "tests" / "unit"
    (unit / "zero").mkdir(parents=True)
    (unit / "common.py").write_text(COMMON)
    (unit / "zero" / "test_made_up.py").write_text(TESTS)
    (unit.parent / "conftest.py").write_text(
        "import os, sys\nsys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"
    )
    broken = tmp_path / "fake" / "deepspeed"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('the tests are to use the installed one')\n")
    argv = [sys.executable, "-m", "tests.deepspeed_suite.run", "--deepspeed", str(tmp_path / "fake")]
    argv += ["--file", "zero/test_made_up.py", "--block", "GAF that keeps everybody", "--timeout", "120"]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env={**os.environ, "PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "zero/test_made_up.py: stock 3 passed, 1 failed" in done.stdout, done.stdout + done.stderr
    assert "2 passed, 2 failed; 2 engines on ranks with it, 0 without; 1 tests differ" in done.stdout
    assert "::test_that_fails_with_a_block: passed, with the block failed; UNEXPECTED" in done.stdout
