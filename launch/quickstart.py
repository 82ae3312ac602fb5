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
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/guard_zero2.json"
CPU_WORKERS = 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_folder() -> Path:
    return Path(os.environ.get("RUN", "runs/quickstart"))


def on_gpus(num_workers: int) -> bool:
    return num_workers <= torch.cuda.device_count()


def command(config: str, run: Path, data: Path, num_workers: int) -> list[str]:
    """The training of the quickstart; what is appended to it takes precedence."""
    # Without instructions for bf16, as many CPUs are, it takes ten times as long as fp32.
    precision = [] if on_gpus(num_workers) else ["--fp32"]
    launcher = f"deepspeed --log_level warning --num_accelerators {num_workers} --master_port {free_port()}"
    training = (
        f"--module ds_gradmix launch/pretrain.py --deepspeed_config {config}"
        f" --model configs/models/llama-tiny.json --data {data} --out {run} --steps 300 --warmup-steps 20"
        " --validate-every 30 --validation-windows 128 --checkpoint-every 60 --telemetry"
    )
    return [*launcher.split(), *training.split(), *precision]


def environment() -> dict[str, str]:
    # ninja is looked up on PATH; ranks that outnumber cores must not each start a thread per core.
    changed = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    if not torch.cuda.is_available():
        changed["DS_ACCELERATOR"] = "cpu"
    return os.environ | changed


def train(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the command, and return its exit status, which is not 0 after a signal.

    SIGINT and SIGTERM are passed on to the ranks, which end after their step, with a checkpoint.
    """
    print(shlex.join(arguments), flush=True)
    # In a new session, so that Ctrl-C reaches only this process and not the ranks.
    runner = subprocess.Popen(arguments, cwd=ROOT, env=variables, start_new_session=True)
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        # The `deepspeed` command does not forward a signal to its ranks, but its child process does.
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(runner.pid)
            for process in parent.children() or [parent]:
                process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    status = runner.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return status or (128 + received[0] if received else 0)


def main() -> None:
    run, config = run_folder(), os.environ.get("CONFIG", CONFIG)
    arguments = command(config, run, run / "data", torch.cuda.device_count() or CPU_WORKERS)
    sys.exit(train([*arguments, *sys.argv[1:]], environment()))


if __name__ == "__main__":
    main()
