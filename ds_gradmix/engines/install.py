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
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter

from ds_gradmix.comm.consistency import ConsistencyCheck, MismatchError, fingerprint_of
from ds_gradmix.comm.groups import gather_objects, group_of
from ds_gradmix.config import KEY, ConfigError, GradmixConfig, misspelt_key, parse_block
from ds_gradmix.engines.allreduce import AllReduceAdapter
from ds_gradmix.engines.compatibility import (
    TESTED_DEEPSPEED,
    lookup,
    refused_engine,
    refused_model_scope,
    refused_settings,
    refused_worker,
)
from ds_gradmix.engines.context import EngineContext
from ds_gradmix.engines.parallel_groups import find_parallel_groups
from ds_gradmix.engines.weight_hooks import attach
from ds_gradmix.engines.zero12 import GradmixZeroOptimizer
from ds_gradmix.exchange.reducer import GradientReducer
from ds_gradmix.log import logger

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


def seam_of(engine: Any) -> GradientReducer | None:
    """The rules at work in an engine, or None."""
    found = getattr(getattr(engine, "optimizer", None), "gradmix", None)
    return found if isinstance(found, GradientReducer) else None


def _building(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = _config_of(args, kwargs)
        block = _checked_block(config)
        if block is not None:
            model = kwargs.get("model", args[1] if len(args) > 1 else None)
            mpu = kwargs.get("mpu", args[6] if len(args) > 6 else None)
            everyone = ConsistencyCheck(group_of([range(dist.get_world_size())], "gloo"))
            _check_alike(model, mpu, config, block, everyone)
            object.__setattr__(self, _BLOCK, block)  # before Module.__init__ there is no other way
            object.__setattr__(self, _HOSTS, everyone)
        original(self, *args, **kwargs)
        if block is not None:
            if not isinstance(self.optimizer, GradmixZeroOptimizer):
                _attach(self, block)
            _refuse(self, block)
        _announce(self, config, block)
        seam = seam_of(self)
        if seam is not None:
            adapter = getattr(self, "_gradmix_adapter", None) or self.optimizer
            weights = adapter.weights if hasattr(adapter, "weights") else adapter._gradmix_weights

            def extrapolate() -> None:
                weights.extrapolate(int(self.global_steps), adapter.learning_rates())

            if weights is not None:
                attach(
                    self,
                    weights,
                    extrapolate,
                    lambda why: seam.load(None, why),
                    lambda: seam.state.loads,
                )

    __init__._gradmix = True  # type: ignore[attr-defined]
    return __init__


def _choosing(original: Any) -> Any:
    @functools.wraps(original)
    def _configure_zero_optimizer(self: Any, optimizer: Any) -> Any:
        block = getattr(self, _BLOCK, None)
        if block is None:
            return original(self, optimizer)
        stock = engine_module.DeepSpeedZeroOptimizer
        engine_module.DeepSpeedZeroOptimizer = type(
            "GradmixZeroOptimizer", (GradmixZeroOptimizer,), {"gradmix_context": _context_of(self, block)}
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


def _checked_block(config: Mapping[str, Any]) -> GradmixConfig | None:
    if KEY not in config:
        return None
    block = parse_block(config[KEY])
    refused = list(refused_settings(config, block))
    if refused:
        raise ConfigError("\n".join(refused))
    return block


def _attach(engine: Any, block: GradmixConfig) -> None:
    """The rules for an optimizer that is not ZeRO's."""
    if engine.optimizer is None:
        raise ConfigError(
            f'"{KEY}": the engine was built without an optimizer; give it one, or remove the block'
        )
    adapter = AllReduceAdapter(engine, _context_of(engine, block))
    adapter.install()
    engine._gradmix_adapter = adapter


def _context_of(engine: Any, block: GradmixConfig) -> EngineContext:
    return EngineContext(
        block,
        find_parallel_groups(engine, getattr(engine, _HOSTS), block.worker),
        lambda: int(engine.global_steps),
        functools.partial(_report, engine),
        not engine.gradient_average,
    )


def _refuse(engine: Any, block: GradmixConfig) -> None:
    """What is seen only on the built engine."""
    seam = seam_of(engine)
    assert seam is not None
    parallelism = seam.parallel.parallelism
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    model_dtype, _ = engine.get_data_types()
    kind = f"ZeRO-{engine.zero_optimization_stage()}"
    if kind == "ZeRO-1" and isinstance(engine.optimizer, BF16_Optimizer):
        kind = "BF16_Optimizer"
    reason = refused_engine(kind, names.get(model_dtype, str(model_dtype)), parallelism)
    reason = reason or refused_model_scope(block, parallelism) or refused_worker(block, parallelism)
    if ".onebit." in type(engine.basic_optimizer).__module__:
        reason = f"{type(engine.basic_optimizer).__name__} reduces gradients itself: use another optimizer"
    if reason is not None:
        raise ConfigError(f'"{KEY}" with {kind}: {reason}; or remove the "{KEY}" block')


def _check_alike(
    model: Any, mpu: Any, config: Mapping[str, Any], block: GradmixConfig, everyone: ConsistencyCheck
) -> None:
    """All ranks must have the same rules, and all workers the same model; DeepSpeed would hang otherwise."""
    if dist.get_world_size() == 1:
        return
    advice = "every rank must be given the same gradmix block, zero_optimization settings and model"
    # A model that DeepSpeed has divided before it is handed over has parts of different shapes.
    divided = int(lookup(config, "tensor_parallel.autotp_size", 0) or 0) > 1
    words = [f"gradmix block {block!r}", f"zero_optimization {config.get('zero_optimization')!r}"]
    everyone.check_equal(fingerprint_of(words), lambda: words, "building the engine", advice)
    words = []
    for name, p in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
        dtype = str(p.dtype).removeprefix("torch.")
        shape = "a part" if divided and is_model_parallel_parameter(p) else tuple(p.shape)
        words.append(f"{name} {shape} {dtype}{'' if p.requires_grad else ' frozen'}")
    grid = model.mpu() if isinstance(model, PipelineModule) else mpu
    replicas = everyone
    if hasattr(grid, "get_data_parallel_group"):
        sets = gather_objects(dist.get_process_group_ranks(grid.get_data_parallel_group()))
        replicas = ConsistencyCheck(group_of(sorted(set(map(tuple, sets))), "gloo"))
    replicas.check_equal(fingerprint_of(words), lambda: words, "building the engine", advice)


def _announce(engine: Any, config: Mapping[str, Any], block: GradmixConfig | None) -> None:
    """Exactly one line, on rank 0, so that nobody trains with plain averaging by mistake."""
    seam = seam_of(engine)
    if dist.get_rank() != 0:
        return
    if block is None or seam is None:
        wrong = misspelt_key(config)
        told = (
            f'the config has "{wrong}" but no "{KEY}" block (misspelt?)'
            if wrong
            else f'the config has no "{KEY}" block'
        )
        logger.warning(f"ds_gradmix: NOT active, gradients are averaged: {told}")
        return
    size = seam.parallel.workers.size
    workers = "1 worker" if size == 1 else f"{size} workers"
    workers += seam.parallel.describe()
    told = f"active over {workers}, ZeRO-{engine.zero_optimization_stage()}: {block.describe()}"
    level = logging.INFO
    if wrong := misspelt_key(config):
        level = logging.WARNING
        told += f'; "{wrong}" is ignored (misspelt?)'
    if block.worker == "node" and seam.parallel.workers.replicas_per_worker == 1:
        level = logging.WARNING
        told += "; by LOCAL_RANK every node has one rank of a data-parallel group: a worker is a rank"
    if size == 1:
        told += "; with one worker every rule of mixing and scaling is the identity"
    elif block.scaling is not None and size < block.scaling.min_workers:
        level = logging.WARNING
        told += f"; {type(block.scaling).__name__} wants at least {block.scaling.min_workers} workers"
    logger.log(level, f"ds_gradmix: {told}")


def _report(engine: Any, numbers: Mapping[str, float]) -> None:
    """What the rules decided in a step, to where DeepSpeed tells how steps go: the log, at every multiple of
    `steps_per_print`, and TensorBoard and what else its monitor serves. This step is not counted yet.
    """
    if not numbers or engine.global_rank != 0:
        return
    step, every = engine.global_steps + 1, engine.steps_per_print()
    if every and step % every == 0:
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.info(f"ds_gradmix: step {step}: {told}")
    if engine.monitor.enabled:
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
