"""LAMB and LARS in the place of an engine's optimizer, and what is refused in their place."""

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from deepspeed.moe.utils import configure_moe_param_groups
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradmix.config import ConfigError
from ds_gradmix.engines.compatibility import (
    REFUSED_UNIVERSAL,
    has_trust_ratios,
    lookup,
    refused_engine,
    refused_flat_partition,
)
from ds_gradmix.engines.engine_request import request_of
from ds_gradmix.engines.optimizer_section import optimizer_of
from ds_gradmix.optim.layerwise import LayerwiseOptimizer


def check_optimizer(
    config: Mapping[str, Any], given: Mapping[str, Any], groups: list[tuple[int, ...]]
) -> None:
    """Raise a ConfigError for an optimizer with trust ratios, ours or another, that the engine about to be
    built would not step as a whole model's.
    """
    client, stage = given.get("optimizer"), lookup(config, "zero_optimization.stage", 0)
    kind, make = f"ZeRO-{stage}", optimizer_of(config)
    if isinstance(client, LayerwiseOptimizer) or (client is None and make is not None):
        reason = refused_engine(kind, "fp32", request_of(config, given, groups).parallelism)
        name = lookup(config, "optimizer.type", "") if client is None else type(client).__name__
        if reason is not None:
            raise ConfigError(f"optimizer: {name} with {kind}: {reason}")
        if str(name).lower() == "lars" and lookup(config, "checkpoint.load_universal", False):
            raise ConfigError(REFUSED_UNIVERSAL)
    elif isinstance(client, torch.optim.Optimizer) and has_trust_ratios(type(client).__name__) and stage:
        raise ConfigError(refused_flat_partition(type(client).__name__, kind))


def check_built_optimizer(engine: Any) -> None:
    """The same of an engine that is built, whose optimizer may have been made by a callable."""
    optimizer = engine.basic_optimizer
    flat = isinstance(engine.optimizer, BF16_Optimizer) or engine.zero_optimization()
    if flat and not isinstance(optimizer, LayerwiseOptimizer) and has_trust_ratios(type(optimizer).__name__):
        kind = type(engine.optimizer).__name__
        raise ConfigError(refused_flat_partition(type(optimizer).__name__, kind))


def take_its_place(engine: Any, given: MutableMapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Have an engine that is about to be built take our optimizer, if the config or the script names it.

    Args:
        engine: as yet without attributes.
        given: its constructor's arguments by name, in which the optimizer is replaced.
        config: the ds_config.

    Returns:
        whether the arguments have changed.
    """
    make, client = optimizer_of(config), given.get("optimizer")
    if isinstance(client, LayerwiseOptimizer):
        client.waits_for_layouts = True
    elif isinstance(client, torch.optim.Optimizer):
        return False
    elif client is not None:
        given["optimizer"] = functools.wraps(client)(functools.partial(_wait, client))
        return True
    elif make is not None:
        given["optimizer"] = functools.partial(_build, engine, make)
    else:
        return False
    given["config_class"].zero_force_ds_cpu_optimizer = False  # DeepSpeed would ask for one of its own
    return client is None


def _build(engine: Any, make: Callable[[Any], LayerwiseOptimizer], parameters: Any) -> LayerwiseOptimizer:
    optimizer = make(configure_moe_param_groups(parameters) if engine.has_moe_layers else parameters)
    optimizer.waits_for_layouts = True
    return optimizer


def _wait(client: Callable[[Any], Any], parameters: Any) -> Any:
    optimizer = client(parameters)
    if isinstance(optimizer, LayerwiseOptimizer):
        optimizer.waits_for_layouts = True
    return optimizer
