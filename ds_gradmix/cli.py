"""`ds_gradmix check CONFIG.json`, `ds_gradmix env` and `ds_gradmix report RUN...`."""

import argparse
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hjson  # what DeepSpeed reads configurations with
import torch

from ds_gradmix.config import KEY, SLOTS, ConfigError, GradmixConfig, check_workers, misspelt_key, parse_block
from ds_gradmix.config_messages import key_text
from ds_gradmix.costs.model import Cluster, Workload
from ds_gradmix.costs.report import cost_table, scale_table
from ds_gradmix.engines.compatibility import refused_settings
from ds_gradmix.engines.deepspeed_api import TESTED_VERSIONS
from ds_gradmix.engines.optimizer_section import optimizer_of
from ds_gradmix.ops import multi_tensor
from ds_gradmix.report import command as report

VERBS = ("check", "env", "report")
_BANDWIDTHS = ("node_bandwidth", "link_bandwidth", "memory_bandwidth")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="ds_gradmix", description="Gradient mixing inside DeepSpeed ZeRO.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    check = verbs.add_parser("check", help="validate the gradmix block of a ds_config and estimate its costs")
    add = check.add_argument
    add("config", type=Path, metavar="CONFIG.json")
    add("--dp", "--workers", type=int, nargs="+", help="data-parallel sizes (default: 4, 8, 64, 512 workers)")
    add("--params", type=float, help="bytes, memory and time for so many parameters a data-parallel rank")
    add("--ranks-per-node", type=int, help="of one data-parallel group (default: 8, or what divides it)")
    add("--tensors", type=int, default=Workload.tensors, help="that the parameters are made of")
    for name in _BANDWIDTHS:
        add(f"--{name.replace('_', '-')}", type=float, default=getattr(Cluster, name) / 1e9, metavar="GB/S")
    verbs.add_parser("env", help="versions, and what of this machine matters")
    report.add_arguments(verbs.add_parser("report", help="one page of what training runs recorded"))
    options = parser.parse_args(arguments)
    if options.verb == "env":
        return _env()
    if options.verb == "report":
        return report.run(options)
    for name, value in vars(options).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not 0 < number < math.inf:
                parser.error(f"--{name.replace('_', '-')}: {number}; allowed are numbers above 0")
    return _check(options)


def _check(options: argparse.Namespace) -> int:
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)  # where a user's own rules are found, as by `python -m ds_gradmix check`
    try:
        config = _read(options.config)
        block = _block_of(config)
        optimizer_of(config)
        clusters = _clusters(options, block)
        for cluster in clusters if options.dp else ():
            check_workers(block, cluster.workers)
        tables = [cost_table(config, block, clusters)]
        for cluster in clusters if options.params else ():
            tables.append(scale_table(config, block, options.params, cluster, options.tensors))
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"{options.config}: {line}", file=sys.stderr)
        return 2
    print(json.dumps({KEY: resolved(block)}, indent=2), *tables, sep="\n")
    return 0


def _clusters(options: argparse.Namespace, block: GradmixConfig) -> list[Cluster]:
    """One for each data-parallel size."""
    bandwidths = [getattr(options, name) * 1e9 for name in _BANDWIDTHS]
    most = options.ranks_per_node or Cluster.ranks_per_node
    usual = {"rank": 1, "node": most}[block.worker] if isinstance(block.worker, str) else block.worker
    found = []
    for size in options.dp or [usual * workers for workers in (4, 8, 64, 512)]:
        # A node has fewer ranks if there are no more, and is full if its size is not given.
        on_node = min(most, size) if options.ranks_per_node else math.gcd(most, size)
        per_worker = on_node if block.worker == "node" else usual
        if not options.ranks_per_node and per_worker % on_node and on_node % per_worker:
            on_node = math.gcd(on_node, per_worker)
        found.append(Cluster(size, on_node, per_worker, *bandwidths))
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """As DeepSpeed reads it: JSON, or Hjson; a key given twice is a mistake."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"duplicate keys: {', '.join(map(key_text, twice))}; give each once")
        return dict(pairs)

    try:
        config = hjson.loads(path.read_text(), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not text: {error}") from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply") from error
    except ConfigError:
        raise
    except ValueError as error:  # HjsonDecodeError, or Python's for an integer of over 4,300 digits
        raise ConfigError(f"is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigError("is not a JSON object; a ds_config is one")
    return config


def _block_of(config: Mapping[str, Any]) -> GradmixConfig:
    wrong = misspelt_key(config)
    if KEY not in config:
        hint = f'did you mean "{KEY}" by "{wrong}"?' if wrong else "without it gradients are averaged as ever"
        raise ConfigError(f'has no "{KEY}" block; {hint}')
    if wrong:
        raise ConfigError(f'"{wrong}" beside "{KEY}" would be ignored; is it misspelt? remove one of them')
    block = parse_block(config[KEY])
    if refused := list(refused_settings(config, block)):
        raise ConfigError("\n".join(refused))
    return block


def resolved(block: GradmixConfig) -> dict[str, Any]:
    """The block as ds_config.json would have it, with every default written out."""
    out = {slot: getattr(block, slot) for slot in SLOTS} | block.model_dump(exclude=set(SLOTS))
    for slot in SLOTS:
        if (rule := out[slot]) is not None:
            out[slot] = {"type": rule.type_name(), "params": rule.model_dump()}
    return out


def _env() -> int:
    for package in ("ds_gradmix", "deepspeed", "torch", "transformers", "sentencepiece"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        tested = f" (tested: {', '.join(TESTED_VERSIONS)})" if package == "deepspeed" else ""
        print(f"{package:14s} {version}{tested}")
    print(f"{'multi-tensor':14s} {multi_tensor.describe()}")
    print(f"{'python':14s} {sys.version.split()[0]}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'accelerators':14s} {', '.join(devices) or 'none'}")
    return 0
