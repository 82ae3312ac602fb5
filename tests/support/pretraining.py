"""launch/pretrain.py on a rank of `run_ranks`, whose fork server has imported everything: what its runs
through a launcher are compared with.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def pretrain(arguments: list[str], stop_step: int | None = None, with_rules: bool = False) -> int:
    """Train with these arguments; the exit status. `stop_step` has one rank told to end, amid that step."""
    from gradmix_pretrain import tokens

    if with_rules:
        import ds_gradmix

        ds_gradmix.enable()
    original = tokens.TrainingWindows.batch

    def told(self: Any, step: int, micro_step: int) -> torch.Tensor:
        if (os.environ["RANK"], step + 1, micro_step) == ("1", stop_step, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, micro_step)

    tokens.TrainingWindows.batch = told  # type: ignore[method-assign]
    sys.argv = ["pretrain.py", *arguments]
    try:
        runpy.run_path(str(LAUNCH / "pretrain.py"), run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, int), end.code
        return end.code
    return 0


def _on_cpu() -> None:
    set_accelerator(CPU_Accelerator())  # also on a machine with GPUs
    os.environ["DS_ACCELERATOR"] = "cpu"


def undisturbed(arguments: list[str]) -> str:
    """Train with the rules, to the end; returns what was printed."""
    _on_cpu()
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
        assert pretrain(arguments, with_rules=True) == 0
    return printed.getvalue()


def stopped(arguments: list[str], step: int, log: Path) -> int:
    """Train with the rules until one rank is told to end; the exit status. All ranks print to `log`."""
    _on_cpu()
    with log.open("a") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    try:
        return pretrain(arguments, step, with_rules=True)
    finally:
        sys.stdout.flush()
