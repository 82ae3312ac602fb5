"""launch/pretrain.py on a rank of `run_ranks`, whose fork server has imported everything: what its runs
through a launcher are compared with.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def undisturbed(arguments: list[str]) -> str:
    """Train with these arguments; returns what was printed."""
    import ds_gradmix

    set_accelerator(CPU_Accelerator())  # also on a machine with GPUs
    os.environ["DS_ACCELERATOR"] = "cpu"
    ds_gradmix.enable()
    sys.argv = ["pretrain.py", *arguments]
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
        runpy.run_path(str(LAUNCH / "pretrain.py"), run_name="__main__")
    return printed.getvalue()
