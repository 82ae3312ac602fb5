"""Checkpoints that a kill at any moment leaves usable, and what must be the same in a resumed run."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

TAG = "global_step"


def latest_step(folder: Path) -> int:
    """The step of the last complete checkpoint, 0 if there is none."""
    latest = folder / "latest"
    return int(latest.read_text().strip().removeprefix(TAG)) if latest.exists() else 0


def save(engine: Any, folder: Path, step: int, keep: int) -> None:
    """Save through the engine, and only when every rank has written its part point `latest` to it.

    DeepSpeed would write `latest` in place, from rank 0, before other ranks are done with their files.
    """
    engine.save_checkpoint(str(folder), tag=f"{TAG}{step}", client_state={"step": step}, save_latest=False)
    if dist.get_rank() == 0:
        write_text(folder / "latest", f"{TAG}{step}")
        saved = sorted(int(path.name.removeprefix(TAG)) for path in folder.glob(f"{TAG}[0-9]*"))
        for old in [number for number in saved if number <= step][:-keep]:
            shutil.rmtree(folder / f"{TAG}{old}")


def load(engine: Any, folder: Path) -> int:
    """Resume from the last complete checkpoint; returns the steps done, 0 without one."""
    if not latest_step(folder):
        return 0
    with torch.no_grad():  # autograd would warn that a pipeline's tied weights are broadcast
        _, client_state = engine.load_checkpoint(str(folder))
    return int(client_state["step"])


def check_identity(run: Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a run with another model, other tokens or other ranks than it had."""
    path = run / "run.json"
    if not latest_step(run / "checkpoint") or not path.exists():
        return
    # Runs that were begun before there was a choice do not say.
    begun_with = {"tensor parallelism": 1, "number of pipeline stages": 1} | json.loads(path.read_text())
    for name, value in json.loads(json.dumps(identity)).items():
        if begun_with.get(name) != value:
            raise ValueError(
                f"--out {run} holds a run with another {name}; give another folder, or remove that one"
            )


def lock(run: Path) -> TextIO:
    """Keep a second training out of a run folder for as long as the returned file lives."""
    file = (run / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"--out {run}: another process is training there") from error
    return file


def write_text(path: Path, text: str) -> None:
    """Replace a file in one motion."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
