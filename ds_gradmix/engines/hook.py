"""Switching ds_gradmix on: from `enable()` on, every DeepSpeed engine honours the gradmix block of its
config.

The engine's constructor is wrapped, rather than `deepspeed.initialize`, which scripts may have imported long
before.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_gradmix.config import KEY, Block, ConfigError, misspelt_key, parse_block
from ds_gradmix.engines.support import TESTED_DEEPSPEED, refused_settings
from ds_gradmix.engines.visibility import watch
from ds_gradmix.engines.zero12 import GradmixZeroOptimizer
from ds_gradmix.log import logger
from ds_gradmix.reduction import Reduction
from ds_gradmix.workers import MismatchError, Workers, fingerprint_of

_BLOCK = "_gradmix_block"  # on an engine, while it is built
_HOSTS = "_gradmix_hosts"


def enable() -> None:
    """Make every DeepSpeed engine built from here on honour its gradmix block; calling it again changes
    nothing.
    """
    if getattr(DeepSpeedEngine.__init__, "_gradmix", False):
        return
    if deepspeed.__version__.split("+")[0] not in TESTED_DEEPSPEED:
        tested = ", ".join(TESTED_DEEPSPEED)
        logger.warning(
            f"ds_gradmix: DeepSpeed {deepspeed.__version__} is untested (tested: {tested}); compare "
            "a run with mixing Mean to one without the block before you trust it"
        )
    DeepSpeedEngine.__init__ = _building(DeepSpeedEngine.__init__)
    DeepSpeedEngine._configure_zero_optimizer = _choosing(DeepSpeedEngine._configure_zero_optimizer)
    sys.excepthook = _telling(sys.excepthook)


def reduction_of(engine: Any) -> Reduction | None:
    """The rules at work in an engine, or None."""
    found = getattr(getattr(engine, "optimizer", None), "gradmix", None)
    return found if isinstance(found, Reduction) else None


def _building(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = _config_of(args, kwargs)
        block = _checked_block(config)
        if block is not None:
            model = kwargs.get("model", args[1] if len(args) > 1 else None)
            _refuse_model(model, kwargs.get("mpu"))
            hosts = dist.new_group(backend="gloo", timeout=default_pg_timeout)
            _check_alike(model, config, block, hosts)
            object.__setattr__(self, _BLOCK, block)  # before Module.__init__ there is no other way
            object.__setattr__(self, _HOSTS, hosts)
        original(self, *args, **kwargs)
        _announce(self, config, block)
        if block is not None:
            watch(self)

    __init__._gradmix = True  # type: ignore[attr-defined]
    return __init__


def _choosing(original: Any) -> Any:
    @functools.wraps(original)
    def _configure_zero_optimizer(self: Any, optimizer: Any) -> Any:
        block = getattr(self, _BLOCK, None)
        if block is None:
            return original(self, optimizer)
        stock = engine_module.DeepSpeedZeroOptimizer
        engine_module.DeepSpeedZeroOptimizer = functools.partial(
            GradmixZeroOptimizer,
            gradmix_block=block,
            gradmix_hosts=getattr(self, _HOSTS),
            gradmix_step=lambda: int(self.global_steps),
            gradmix_report=functools.partial(_monitor, self),
        )
        try:
            return original(self, optimizer)
        finally:
            engine_module.DeepSpeedZeroOptimizer = stock

    return _configure_zero_optimizer


def _config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    config = kwargs.get("config_class", args[10] if len(args) > 10 else None)
    found = getattr(config, "_param_dict", {})
    return found if isinstance(found, Mapping) else {}


def _checked_block(config: Mapping[str, Any]) -> Block | None:
    if KEY not in config:
        return None
    block = parse_block(config[KEY])
    refused = list(refused_settings(config, block))
    if refused:
        raise ConfigError("\n".join(refused))
    return block


def _refuse_model(model: Any, mpu: Any) -> None:
    """What no setting tells: parallelism that comes with the model."""
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime.pipe.module import PipelineModule

    remove = f'remove the "{KEY}" block, or train without it'
    if isinstance(model, PipelineModule):
        raise ConfigError(
            f"model: PipelineModule (pipeline parallelism) is not supported by this version: {remove}"
        )
    if isinstance(model, torch.nn.Module) and any(isinstance(module, MoE) for module in model.modules()):
        raise ConfigError(
            f"model: mixture-of-experts layers (MoE) are not supported by this version: {remove}"
        )
    sizes = {
        name: int(getattr(mpu, name)())
        for name in ("get_model_parallel_world_size", "get_sequence_parallel_world_size")
        if hasattr(mpu, name)
    }
    for name, size in sizes.items():
        if size > 1:
            raise ConfigError(f"mpu.{name}(): {size}, but only 1 is supported by this version: {remove}")


def _check_alike(model: Any, config: Mapping[str, Any], block: Block, hosts: dist.ProcessGroup) -> None:
    """All ranks must have the same rules and model; DeepSpeed would hang on differing shapes."""
    if dist.get_world_size() == 1:
        return
    advice = "every rank must be given the same gradmix block, zero_optimization settings and model"
    words = [f"gradmix block {block!r}", f"zero_optimization {config.get('zero_optimization')!r}"]
    for name, p in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
        dtype = str(p.dtype).removeprefix("torch.")
        words.append(f"{name} {tuple(p.shape)} {dtype}{'' if p.requires_grad else ' frozen'}")
    Workers(None, hosts).agree(fingerprint_of(words), lambda: words, "building the engine", advice)


def _announce(engine: Any, config: Mapping[str, Any], block: Block | None) -> None:
    """Exactly one line, on rank 0, so that nobody trains with plain averaging by mistake."""
    reduction = reduction_of(engine)
    if block is not None and reduction is None:
        raise ConfigError(
            f'"{KEY}": the engine was built without the ZeRO optimizer that carries the rules '
            f"({type(engine.optimizer).__name__}); give it an optimizer, or remove the block"
        )
    if dist.get_rank() != 0:
        return
    if block is None or reduction is None:
        wrong = misspelt_key(config)
        told = (
            f'the config has "{wrong}" but no "{KEY}" block (misspelt?)'
            if wrong
            else f'the config has no "{KEY}" block'
        )
        logger.warning(f"ds_gradmix: NOT active, gradients are averaged: {told}")
        return
    workers = "1 worker" if reduction.workers.size == 1 else f"{reduction.workers.size} workers"
    told = f"active over {workers}, ZeRO-{engine.zero_optimization_stage()}: {block.describe()}"
    level = logging.INFO
    if wrong := misspelt_key(config):
        level = logging.WARNING
        told += f'; "{wrong}" is ignored (misspelt?)'
    if reduction.workers.size == 1:
        told += "; with one worker every rule of mixing and scaling is the identity"
    elif block.scaling is not None and reduction.workers.size < block.scaling.min_workers:
        level = logging.WARNING
        told += f"; {type(block.scaling).__name__} wants at least {block.scaling.min_workers} workers"
    logger.log(level, f"ds_gradmix: {told}")


def _monitor(engine: Any, numbers: Mapping[str, float]) -> None:
    """To TensorBoard and what else DeepSpeed's monitor serves; the step's samples are not yet counted."""
    if engine.monitor.enabled and engine.global_rank == 0:
        samples = engine.global_samples + engine.train_batch_size()
        events = [(f"Train/GradMix/{name}", value, samples) for name, value in numbers.items()]
        engine.monitor.write_events(events)


def _telling(original: Any) -> Any:
    """Our own errors are told without a traceback above them: they are about the configuration, not about
    code.
    """

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, (ConfigError, MismatchError)):
            sys.stderr.write("".join(f"ds_gradmix: error: {line}\n" for line in str(error).splitlines()))
            sys.stderr.flush()
            if issubclass(kind, ConfigError) and dist.is_initialized():
                dist.destroy_process_group()  # or its threads may abort the interpreter, whose status is 1
        else:
            original(kind, error, trace)

    return excepthook
