"""`ds_gradmix check CONFIG.json` and `ds_gradmix env`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_gradmix.config import KEY, Block, ConfigError, misspelt_key, parse_block
from ds_gradmix.costs import cost_table
from ds_gradmix.engines.support import TESTED_DEEPSPEED, refused_settings

VERBS = ("check", "env")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="ds_gradmix", description="Gradient mixing inside DeepSpeed ZeRO.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    check = verbs.add_parser(
        "check", help="validate the gradmix block of a ds_config and tell what it will cost"
    )
    check.add_argument("config", type=Path, metavar="CONFIG.json")
    check.add_argument(
        "--workers", type=int, nargs="+", default=[4, 8, 64, 512], help="data-parallel sizes to show"
    )
    verbs.add_parser("env", help="versions, and what of this machine matters")
    options = parser.parse_args(arguments)
    if options.verb == "env":
        return _env()
    if min(options.workers) < 1:
        parser.error("--workers: each must be at least 1")
    return _check(options.config, options.workers)


def _check(path: Path, workers: Sequence[int]) -> int:
    try:
        config = _read(path)
        block = _block_of(config)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"{path}: {line}", file=sys.stderr)
        return 2
    print(json.dumps({KEY: resolved(block)}, indent=2))
    print(cost_table(config, block, workers))
    return 0


def _read(path: Path) -> Mapping[str, Any]:
    """As DeepSpeed reads it: JSON, or Hjson; a key given twice is a mistake."""
    import hjson  # what DeepSpeed depends on for this

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"duplicate keys: {', '.join(twice)}; give each once")
        return dict(pairs)

    try:
        config = hjson.loads(path.read_text(), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not text: {error}") from error
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigError("is not a JSON object; a ds_config is one")
    return config


def _block_of(config: Mapping[str, Any]) -> Block:
    if KEY not in config:
        wrong = misspelt_key(config)
        hint = (
            f'; did you mean "{KEY}" by "{wrong}"?'
            if wrong
            else "; without it gradients are averaged as ever"
        )
        raise ConfigError(f'has no "{KEY}" block{hint}')
    if wrong := misspelt_key(config):
        raise ConfigError(f'"{wrong}" beside "{KEY}" would be ignored; is it misspelt? remove one of them')
    block = parse_block(config[KEY])
    refused = list(refused_settings(config, block))
    if refused:
        raise ConfigError("\n".join(refused))
    return block


def resolved(block: Block) -> dict[str, Any]:
    """The block as ds_config.json would have it, with every default written out."""
    out: dict[str, Any] = {}
    for name in type(block).model_fields:
        value = getattr(block, name)
        if name in ("mixing", "scaling", "extrapolation") and value is not None:
            value = {"type": type(value).__name__, "params": value.model_dump()}
        out[name] = value
    return out


def _env() -> int:
    import torch

    for package in ("ds_gradmix", "deepspeed", "torch", "transformers", "sentencepiece"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        tested = f" (tested: {', '.join(TESTED_DEEPSPEED)})" if package == "deepspeed" else ""
        print(f"{package:14s} {version}{tested}")
    print(f"{'python':14s} {sys.version.split()[0]}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'accelerators':14s} {', '.join(devices) or 'none'}")
    return 0
