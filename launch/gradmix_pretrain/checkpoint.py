"""Checkpoints that stay usable when a run is killed at any moment, and checks before a run is resumed."""

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
    """Save a checkpoint through the engine, and write `latest` after every rank has written its files.

    DeepSpeed's `save_latest` would let rank 0 write `latest` while other ranks still write their files.
    """
    engine.save_checkpoint(str(folder), tag=f"{TAG}{step}", client_state={"step": step}, save_latest=False)
    if dist.get_rank() == 0:
        write_text(folder / "latest", f"{TAG}{step}")
        saved = sorted(int(path.name.removeprefix(TAG)) for path in folder.glob(f"{TAG}[0-9]*"))
        for old in [number for number in saved if number <= step][:-keep]:
            shutil.rmtree(folder / f"{TAG}{old}")


def load(engine: Any, folder: Path) -> int:
    """Load the last complete checkpoint, and return its step; 0 if there is none."""
    if not latest_step(folder):
        return 0
    with torch.no_grad():  # or autograd warns, since a pipeline broadcasts tied weights
        _, client_state = engine.load_checkpoint(str(folder))
    return int(client_state.get("step", engine.global_steps))  # ds_gradmix saves one when it ends a run


def check_identity(run: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError if the run was started with another model, other tokens or other ranks."""
    path = run / "run.json"
    if not latest_step(run / "checkpoint") or not path.exists():
        return
    started_with = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(identity)).items():
        if started_with.get(name) != value:
            raise ValueError(
                f"--out {run} holds a run with another {name}; give another folder, or remove that one"
            )


def lock(run: Path) -> TextIO:
    """Lock a run folder against a second training, until the returned file is closed."""
    file = (run / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"--out {run}: another process is training there") from error
    return file


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
