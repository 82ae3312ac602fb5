"""`ds_gradmix check CONFIG.json`: is the gradmix block valid, what does it mean, and what does it cost?"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ds_gradmix.commands import layout
from ds_gradmix.commands.config_file import (
    MISTAKES,
    block_of,
    described,
    parse_text,
    read_text,
    report_mistakes,
    resolved,
)
from ds_gradmix.config import KEY, GradmixConfig, check_workers
from ds_gradmix.config_messages import printable, value_text
from ds_gradmix.costs import report
from ds_gradmix.costs.model import Cluster, Workload
from ds_gradmix.engines.compatibility import lookup

HELP = "validate the gradmix block of a ds_config and estimate its costs"
_BANDWIDTHS = ("node_bandwidth", "link_bandwidth", "memory_bandwidth")
_MAX_NUMBER = 1e18
# What a Trainer or Accelerate fills in where it is "auto", and the costs depend on.
_AUTO = (
    "bf16.enabled",
    "fp16.enabled",
    "gradient_accumulation_steps",
    "zero_optimization.reduce_bucket_size",
)


class Checked(NamedTuple):
    """What a check found out about a block without mistakes."""

    path: Path
    block: GradmixConfig
    warnings: list[str]
    relative_bytes: list[dict[str, float]]
    notes: list[str]
    steps: list[report.StepCosts]
    option: str  # by which a script is given the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the sizes that costs are wanted for, and what a cluster is assumed to be."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.json")
    add("--json", action="store_true", help="one JSON object, for programs")
    add("--dp", "--workers", type=int, nargs="+", help="data-parallel sizes (default: 4, 8, 64, 512 workers)")
    add("--params", type=float, help="bytes, memory and time for so many parameters a data-parallel rank")
    add("--ranks-per-node", type=int, help="of one data-parallel group (default: 8, or what divides it)")
    add("--tensors", type=int, default=Workload.tensors, help="that the parameters are made of")
    for name in _BANDWIDTHS:
        add(f"--{name.replace('_', '-')}", type=float, default=getattr(Cluster, name) / 1e9, metavar="GB/S")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what a block means and costs, or every mistake in it; the exit status."""
    for name, value in vars(options).items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and not 0 < number <= _MAX_NUMBER:
                text = value_text(number)
                parser.error(f"--{name.replace('_', '-')}: {text}; allowed are numbers above 0, to 1e18")
    try:
        checked = _check(options)
    except MISTAKES as error:
        return report_mistakes(options.config, error)
    if options.json:  # a param of somebody's own rule may be of any type
        print(json.dumps(_data(checked), indent=2, default=str))
    else:
        print("\n".join(_lines(checked)))
    return 0


def _check(options: argparse.Namespace) -> Checked:
    config = parse_text(read_text(options.config))
    block = block_of(config)
    clusters = _clusters(options, block)
    for cluster in clusters if options.dp else ():
        check_workers(block, cluster.workers)
    return Checked(
        options.config,
        block,
        list(_warnings(config, block, clusters if options.dp else ())),
        report.relative_bytes(config, block, clusters),
        report.memory_notes(config, block),
        [
            report.step_costs(config, block, options.params, cluster, options.tensors)
            for cluster in (clusters if options.params else ())
        ],
        "--deepspeed" if _is_for_a_trainer(config) else "--deepspeed_config",
    )


def _is_for_a_trainer(value: object) -> bool:
    """Whether something is "auto", which the Trainer of transformers fills in."""
    if isinstance(value, Mapping):
        return any(map(_is_for_a_trainer, value.values()))
    return value == "auto"


def _clusters(options: argparse.Namespace, block: GradmixConfig) -> list[Cluster]:
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


def _warnings(config: Mapping[str, Any], block: GradmixConfig, clusters: Sequence[Cluster]) -> Iterator[str]:
    """What is allowed, and may not be what was meant; `clusters` only where their sizes were asked for."""
    needed = 1 if block.scaling is None else block.scaling.min_workers
    name = None if block.scaling is None else printable(block.scaling.type_name())
    for cluster in clusters:
        if cluster.workers == 1:
            yield f"with {cluster.ranks} ranks there is one worker, and every rule is the identity"
        elif cluster.workers < needed:
            yield f"{name} wants at least {needed} workers, and {cluster.ranks} ranks are {cluster.workers}"
    if needed > 1 and not clusters:
        yield f"{name} wants at least {needed} workers; --dp checks a number of ranks"
    if lookup(config, "gradient_predivide_factor", 1.0) != 1.0:
        yield "gradient_predivide_factor has no effect except on plain averaging: it only moves rounding"
    if auto := [path for path in _AUTO if lookup(config, path, None) == "auto"]:
        yield (
            f'"auto" is filled in when training starts, and DeepSpeed\'s default is assumed here: '
            f"{', '.join(auto)}"
        )


def _data(checked: Checked) -> dict[str, Any]:
    """Everything that is known, for programs."""
    steps = [
        {
            "parameters": step.parameters,
            "cluster": asdict(step.cluster),
            "stock": step.stock._asdict(),
            "block": step.block._asdict(),
            "notes": step.notes,
        }
        for step in checked.steps
    ]
    return {
        KEY: resolved(checked.block),
        "warnings": checked.warnings,
        "costs": {
            "sent_relative_to_stock": [
                {name.replace(" ", "_"): value for name, value in row.items()}
                for row in checked.relative_bytes
            ],
            "notes": [note.strip() for note in checked.notes],
            "steps": steps,
        },
    }


def _lines(checked: Checked) -> Iterator[str]:
    """The same for people."""
    yield f"{printable(str(checked.path))}: the {KEY} block is valid"
    yield ""
    yield from layout.columns(described(checked.block))
    if checked.warnings:
        yield ""
        yield from layout.wrapped(f"warning: {warning}" for warning in checked.warnings)
    yield ""
    yield from layout.wrapped([*report.cost_table(checked.relative_bytes), *checked.notes])
    for step in checked.steps:
        yield ""
        yield from layout.wrapped(report.step_table(step))
    yield ""
    command = ["deepspeed", "--module", "ds_gradmix", "train.py"]
    yield from layout.next_command(*command, checked.option, str(checked.path))
