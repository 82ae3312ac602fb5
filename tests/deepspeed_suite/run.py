"""Runs DeepSpeed's tests and compares: `python -m tests.deepspeed_suite.run --deepspeed CHECKOUT`.

The exit status is 1 if a test ends otherwise with a block than without it and no reason is known, or if
nothing was compared: a file without tests or not ended in time, or a block that no engine of any file had.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch

from tests.deepspeed_suite.compare import Outcomes, counts, differences, outcomes_of
from tests.deepspeed_suite.files import BLOCKS, EXPECTED, FILES
from tests.deepspeed_suite.inject import BLOCK, CHECKOUT, LOG

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "tests.deepspeed_suite.inject"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--deepspeed", type=Path, metavar="CHECKOUT", help="of DeepSpeed, for its folder tests")
    add("--file", action="append", metavar="FILE", help="in tests/unit; default: those of files.py")
    add("--block", action="append", choices=list(BLOCKS), help="default: all of them")
    add("--timeout", type=float, default=3600.0, help="seconds for a file, which may compile first")
    return parser.parse_args(arguments)


def why_not(checkout: Path | None) -> str | None:
    """Why there is nothing to run, or None."""
    if checkout is None:
        return "no checkout of DeepSpeed given: make test-deepspeed DEEPSPEED=<folder>"
    if not (checkout / "tests" / "unit" / "common.py").is_file():
        return f"{checkout} is no checkout of DeepSpeed: it has no tests/unit/common.py"
    return None


class Run(NamedTuple):
    """Where tests are run from, and how long a file may take."""

    checkout: Path
    extensions: Path  # what tests compile, once; it does not take the place of what the user has compiled
    timeout: float


def unlock(extensions: Path) -> None:
    """Remove the locks that a killed process left, or all later tests wait for its owner."""
    for lock in extensions.glob("*/lock"):
        lock.unlink()


def run_file(run: Run, file: str, block: Any) -> tuple[Outcomes, Counter[str]]:
    """The outcomes of a file's tests, and how many of their engines had the block ("active") or had not.

    There are no outcomes if the file did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        log.touch()
        env = {
            **os.environ,
            BLOCK: json.dumps(block),
            CHECKOUT: str(run.checkout),
            LOG: str(log),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TORCH_EXTENSIONS_DIR": str(run.extensions),
            "OMP_NUM_THREADS": "1",
            "DS_UNITTEST_TIMEOUT": str(int(run.timeout / 4)),
        }
        if not torch.cuda.is_available():
            env["DS_ACCELERATOR"] = "cpu"
        argv = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider"]
        argv += ["-p", "no:xdist", "-p", "no:randomly", f"--junitxml={report}", f"unit/{file}"]
        with (Path(folder) / "output").open("w+") as output:
            process = subprocess.Popen(
                argv,
                cwd=run.checkout / "tests",
                env=env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                process.wait(run.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                unlock(run.extensions)
            output.seek(0)
            if not report.exists():
                print(output.read()[-2000:], file=sys.stderr)
                return {}, Counter()
        return outcomes_of(report), Counter(log.read_text().split())


def compare_file(run: Run, file: str, blocks: Sequence[str], active: Counter[str]) -> int:
    """Run a file without and with each block; how many differences have no reason.

    `active` is added the engines that had each block.
    """
    start = time.monotonic()
    stock, _ = run_file(run, file, None)
    if not stock:
        print(f"{file}: no tests, or not ended in time: UNEXPECTED", flush=True)
        return 1
    print(f"{file}: stock {counts(stock)} ({time.monotonic() - start:.0f} s)", flush=True)
    unexpected = 0
    for name in blocks:
        ours, engines = run_file(run, file, BLOCKS[name])
        active[name] += engines["active"]
        found = differences(stock, ours, EXPECTED.get(name, {}))
        unexpected += sum(difference.reason is None for difference in found)
        print(
            f"    {name}: {counts(ours)}; {engines['active']} engines on ranks with it, "
            f"{engines['without']} without; {len(found)} tests differ",
            *(f"        {difference}" for difference in found),
            sep="\n",
            flush=True,
        )
    return unexpected


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if (reason := why_not(options.deepspeed)) is not None:
        print(f"skipped: {reason}")
        return 0
    checkout = Path(os.path.realpath(options.deepspeed))
    version = checkout / "version.txt"
    theirs = version.read_text().strip() if version.exists() else "an unknown version"
    print(f"DeepSpeed {deepspeed.__version__} as installed, by the tests of {theirs}")
    unexpected, blocks, active = 0, options.block or list(BLOCKS), Counter[str]()
    run = Run(checkout, ROOT / ".build" / "torch_extensions", options.timeout)
    run.extensions.mkdir(parents=True, exist_ok=True)
    unlock(run.extensions)
    for file in options.file or FILES:
        unexpected += compare_file(run, file, blocks, active)
    idle = [name for name in blocks if not active[name]]
    for name in idle:
        print(f"{name}: no engine had this block, so nothing was compared")
    print(f"{unexpected} unexpected differences")
    return int(unexpected > 0 or bool(idle))


if __name__ == "__main__":
    sys.exit(main())
