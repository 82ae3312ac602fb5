"""What users are told of an engine: one line when it is built, and the rules' decisions after each step."""

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import KEY, GradmixConfig, misspelt_key
from ds_gradmix.engines.compatibility import lookup
from ds_gradmix.log import logger


def announce_stock(config: Mapping[str, Any]) -> None:
    """Warn on rank 0 that an engine without a block averages, so that nobody trains with it by mistake."""
    wrong = misspelt_key(config)
    why = f'has "{wrong}" but no "{KEY}" block (misspelt?)' if wrong else f'has no "{KEY}" block'
    if dist.get_rank() == 0:
        logger.warning(f"ds_gradmix: NOT active, gradients are averaged: the config {why}")


def announce_rules(
    engine: Any, config: Mapping[str, Any], block: GradmixConfig, parallel: ParallelGroups
) -> None:
    """Say on rank 0, in one line, which rules are at work in an engine, and over which workers."""
    size = parallel.workers.size
    parts = [f"{size} worker{'' if size == 1 else 's'}{parallel.describe()}, "]
    parts[0] += f"ZeRO-{engine.zero_optimization_stage()}: {block.describe()}"
    warnings = []
    if wrong := misspelt_key(config):
        warnings.append(f'"{wrong}" is ignored (misspelt?)')
    if block.worker == "node" and parallel.workers.replicas_per_worker == 1:
        warnings.append("by LOCAL_RANK every node has one rank of a data-parallel group: a worker is a rank")
    if size > 1 and block.scaling is not None and size < block.scaling.min_workers:
        warnings.append(f"{block.scaling.type_name()} wants at least {block.scaling.min_workers} workers")
    if size == 1:
        parts.append("with one worker every rule of mixing and scaling is the identity")
    if lookup(config, "gradient_predivide_factor", 1.0) != 1.0:
        parts.append(
            "gradient_predivide_factor has no effect except on plain averaging: it only moves rounding"
        )
    if dist.get_rank() == 0:
        level = logging.WARNING if warnings else logging.INFO
        logger.log(level, f"ds_gradmix: active over {'; '.join([*parts, *warnings])}")


def announce_optimizer(engine: Any) -> None:
    """Say on rank 0 that the optimizer knows where parameters lie."""
    if dist.get_rank() == 0:
        name, stage = type(engine.basic_optimizer).__name__, engine.zero_optimization_stage()
        logger.info(f"ds_gradmix: {name} takes trust ratios of whole parameters, ZeRO-{stage}")


def report_step(engine: Any, stats: Mapping[str, float], by_worker: bool) -> None:
    """Report a step's numbers, before the engine counts it, where DeepSpeed reports its steps: in the log at
    every multiple of `steps_per_print`, and to the writers of its monitor, also of each worker if wanted.
    """
    if not stats or engine.global_rank != 0:
        return
    step, every = engine.global_steps + 1, engine.steps_per_print()
    if every and step % every == 0:
        text = ", ".join(f"{name} {value:.4g}" for name, value in stats.items() if "/" not in name)
        logger.info(f"ds_gradmix: step {step}: {text}")
    if engine.monitor.enabled:
        samples = engine.global_samples + engine.train_batch_size()
        events = [(f"Train/GradMix/{name}", value, samples) for name, value in stats.items()]
        events = [event for event in events if by_worker or event[0].count("/") == 2]
        engine.monitor.write_events(events)
