"""Runs the `deepspeed` command for `make pretrain`: a small model on every GPU, or on 4 CPU processes.

Arguments are appended to those of pretrain.py here, so they take precedence.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU_WORKERS = 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(run: Path, extra: Sequence[str]) -> list[str]:
    config = os.environ.get("CONFIG", "configs/gaf_vrgd_zero2.json")
    num_workers = torch.cuda.device_count() or CPU_WORKERS
    launcher = f"deepspeed --log_level warning --num_accelerators {num_workers} --master_port {free_port()}"
    training = (
        f"--module ds_gradmix launch/pretrain.py --deepspeed_config {config}"
        f" --model configs/models/llama-tiny.json --data {run}/data --out {run} --steps 300 --warmup-steps 20"
        " --validate-every 30 --validation-windows 128 --checkpoint-every 60 --telemetry"
    )
    return [*launcher.split(), *training.split(), *extra]


def environment() -> dict[str, str]:
    # ninja is looked up on PATH; ranks that outnumber cores must not each start a thread per core.
    changed = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    if not torch.cuda.is_available():
        changed["DS_ACCELERATOR"] = "cpu"
    return os.environ | changed


def main() -> None:
    run = Path(os.environ.get("RUN", "runs/quickstart"))
    arguments = command(run, sys.argv[1:])
    print(shlex.join(arguments), flush=True)
    # In a new session, so that Ctrl-C reaches only this process and not the ranks.
    runner = subprocess.Popen(arguments, cwd=ROOT, env=environment(), start_new_session=True)

    def stop(number: int, frame: object) -> None:
        # The `deepspeed` command does not forward a signal to its ranks, but its child process does.
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(runner.pid)
            for process in parent.children() or [parent]:
                process.terminate()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.exit(runner.wait())


if __name__ == "__main__":
    main()
