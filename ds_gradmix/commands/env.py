"""`ds_gradmix env`: versions, and what of this machine matters."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ds_gradmix.commands import layout
from ds_gradmix.engines.deepspeed_api import TESTED_VERSIONS
from ds_gradmix.ops import multi_tensor

HELP = "versions, and what of this machine matters"
# Packages that are needed for something else than training by DeepSpeed alone, and what for.
_OPTIONAL = {
    "transformers": "launch/pretrain.py",
    "sentencepiece": "launch/pretrain.py",
    "accelerate": "docs/accelerate.md",
    "trl": "docs/trl.md",
    "lightning": "docs/lightning.md",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom it is printed for."""
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what is installed; the exit status."""
    found = _found()
    print(json.dumps(found, indent=2) if options.json else "\n".join(_lines(found)))
    return 0


def _found() -> dict[str, Any]:
    packages = ["ds_gradmix", "deepspeed", "torch", *_OPTIONAL]
    return {
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in packages}},
        "tested_deepspeed": list(TESTED_VERSIONS),
        "multi_tensor": multi_tensor.describe(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(found: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, version in found["versions"].items():
        text = version or "not installed"
        if name == "deepspeed":
            text += f" (tested: {', '.join(TESTED_VERSIONS)})"
        elif version is None and name in _OPTIONAL:
            text += f" (needed for {_OPTIONAL[name]} only)"
        rows.append((name, text))
    rows.append(("multi-tensor", found["multi_tensor"]))
    on_cpu = "none: put DS_ACCELERATOR=cpu before the deepspeed command"
    rows.append(("accelerators", ", ".join(found["accelerators"]) or on_cpu))
    yield from layout.columns(rows)
    yield ""
    if found["versions"]["deepspeed"] in TESTED_VERSIONS:
        yield from layout.next_command("ds_gradmix", "check", "ds_config.json")
    else:
        yield from layout.next_command("pip", "install", f"deepspeed=={TESTED_VERSIONS[-1]}")
