"""Switching ds_gradmix on and off: while it is on, every DeepSpeed engine honours its config's gradmix block.

The engine's constructor is wrapped, rather than `deepspeed.initialize`, which scripts may have imported long
before. An engine with a block is built by all ranks of the world, since all take part in making its process
groups; engines without one may be built by any.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.superoffload import superoffload_stage3  # noqa: F401  # derives from stage 3's class
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from ds_gradmix.comm.consistency import ConsistencyCheck
from ds_gradmix.comm.groups import gather_objects, group_of
from ds_gradmix.comm.peers import announce
from ds_gradmix.config import KEY, ConfigError, GradmixConfig, for_stage, parse_block
from ds_gradmix.engines import deepspeed_api, reporting
from ds_gradmix.engines.allreduce import AllReduceAdapter
from ds_gradmix.engines.compatibility import check_request, lookup, refused_optimizer
from ds_gradmix.engines.context import EngineContext
from ds_gradmix.engines.engine_request import arguments_of, config_of, groups_of, request_of
from ds_gradmix.engines.optimizer_install import check_built_optimizer, check_optimizer, take_its_place
from ds_gradmix.engines.optimizer_layout import tell_layouts
from ds_gradmix.engines.optimizer_section import OPTIMIZERS
from ds_gradmix.engines.parallel_groups import find_parallel_groups
from ds_gradmix.engines.telemetry import StepReporter
from ds_gradmix.engines.weight_hooks import attach
from ds_gradmix.engines.zero3 import GradmixZero3Optimizer
from ds_gradmix.engines.zero12 import GradmixZeroOptimizer
from ds_gradmix.exchange.reducer import GradientReducer

_ADVICE = "every rank must be given the same gradmix block, zero_optimization settings and model"
# Where DeepSpeed looks its optimizers up when it builds an engine, and those that take their place.
_OPTIMIZERS: tuple[tuple[Any, str, type], ...] = (
    (engine_module, "DeepSpeedZeroOptimizer", GradmixZeroOptimizer),
    (stage3, "DeepSpeedZeroOptimizer_Stage3", GradmixZero3Optimizer),
)
_enabled = False


def enable() -> None:
    """Make every DeepSpeed engine built from here on honour its gradmix block, if DeepSpeed's API fits."""
    global _enabled
    if not _enabled:
        deepspeed_api.check_functions()
        ZERO_SUPPORTED_OPTIMIZERS.extend(OPTIMIZERS.values())
    deepspeed_api.patch(DeepSpeedEngine, "__init__", _building)
    _enabled = True


def disable() -> None:
    """Give DeepSpeed its own constructor back; engines that are built already keep their rules."""
    global _enabled
    if _enabled:
        _enabled = False
        for kind in OPTIMIZERS.values():
            ZERO_SUPPORTED_OPTIMIZERS.remove(kind)
        deepspeed_api.restore(DeepSpeedEngine, "__init__")


def reducer_of(engine: Any) -> GradientReducer | None:
    """The rules at work in an engine, or None."""
    found = getattr(getattr(engine, "optimizer", None), "gradmix", None)
    return found if isinstance(found, GradientReducer) else None


def _building(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _enabled or "_gradmix_block" in vars(self):  # wrapped twice, around someone else's wrapper
            original(self, *args, **kwargs)
            return
        given = arguments_of(args, kwargs)
        config, groups = config_of(given), groups_of(given)
        block = _parse(config, given, groups)
        object.__setattr__(self, "_gradmix_block", block)  # before Module.__init__ there is no other way
        build = functools.partial(original, self, *args, **kwargs)
        if take_its_place(self, given, config):
            build = functools.partial(original, self, **given)
        with contextlib.ExitStack() as stack:
            for check in announce(groups, f'no "{KEY}" block' if block is None else None):
                if block is not None:
                    check.wait()
                stack.enter_context(check.watch())
            if block is not None:
                _build(self, build, given, block)
            else:
                build()
                reporting.announce_stock(config)
            check_built_optimizer(self)
            tell_layouts(self)

    return __init__


def _parse(
    config: Mapping[str, Any], given: Mapping[str, Any], groups: list[tuple[int, ...]]
) -> GradmixConfig | None:
    """The config's block, if it has one, checked against all that is known before the engine is built."""
    if KEY not in config:
        check_optimizer(config, given, groups)
        return None
    try:
        block = for_stage(parse_block(config[KEY]), lookup(config, "zero_optimization.stage", 0))
        check_request(config, block, request_of(config, given, groups))
        check_optimizer(config, given, groups)
    except ConfigError:
        for check in announce(groups, f'a "{KEY}" block that is refused'):
            check.leave()
        raise
    return block


def _build(engine: Any, build: Callable[[], None], given: Mapping[str, Any], block: GradmixConfig) -> None:
    """Build an engine whose gradients are reduced by the rules of a block."""
    config = config_of(given)
    everyone = ConsistencyCheck(group_of([range(dist.get_world_size())], "gloo"))
    _check_equal(given, block, everyone)
    configure = engine._configure_zero_optimizer
    context = functools.cache(functools.partial(_context_of, engine, everyone, block))

    def configure_zero_optimizer(optimizer: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for module, name, ours in _OPTIMIZERS:
                stock = getattr(module, name)
                stack.callback(setattr, module, name, stock)
                setattr(module, name, _optimizer_class(ours, stock, context()))
            return configure(optimizer)

    object.__setattr__(engine, "_configure_zero_optimizer", configure_zero_optimizer)
    build()
    del engine._configure_zero_optimizer  # the class's own is there again
    deepspeed_api.check_attributes(engine, "DeepSpeedEngine")
    if reason := refused_optimizer(type(engine.basic_optimizer).__name__):  # one made by a callable
        raise ConfigError(f'"{KEY}": {reason}; or remove the "{KEY}" block')
    adapter: Any = engine.optimizer
    if not isinstance(adapter, GradmixZeroOptimizer | GradmixZero3Optimizer):
        deepspeed_api.check_attributes(engine.optimizer, type(engine.optimizer).__name__)
        adapter = AllReduceAdapter(engine, context())
        adapter.install()
    reducer: GradientReducer = engine.optimizer.gradmix
    reporting.announce_rules(engine, config, block, reducer.parallel)
    context().report.attach(reducer)
    if reducer.weights is not None:
        _attach(engine, adapter, reducer, reducer.weights)


def _context_of(engine: Any, everyone: ConsistencyCheck, block: GradmixConfig) -> EngineContext:
    """The context of an engine that has its process groups; a call of all ranks."""
    parallel = find_parallel_groups(engine, everyone, block)

    def batch() -> int:  # DeepSpeed's `train_batch_size` may count ranks that share a replica
        of_replica = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()
        return int(of_replica) * parallel.workers.num_replicas

    return EngineContext(
        block,
        parallel,
        lambda: int(engine.global_steps),
        batch,
        StepReporter(engine, block, parallel),
        sums_gradients=not engine.gradient_average,
    )


def _attach(engine: Any, adapter: Any, reducer: GradientReducer, weights: Any) -> None:
    """Have the engine's forwards move its parameters to the extrapolated point."""

    def extrapolate() -> None:
        weights.extrapolate(int(engine.global_steps), adapter.learning_rates())

    attach(engine, weights, extrapolate, lambda why: reducer.load(None, why), lambda: reducer.state.loads)


def _optimizer_class(ours: type, stock: type, context: EngineContext) -> type:
    """A class with one engine's context, for DeepSpeed to build; `stock` may be someone else's subclass."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(built, self).__init__(*args, gradmix_context=context, **kwargs)
        if is_deepspeeds:
            self.__class__ = ours  # which pickle finds by its name

    is_deepspeeds = issubclass(ours, stock)
    bases = (ours,) if is_deepspeeds else (ours, stock)
    same = {name: getattr(ours, name) for name in ("__module__", "__qualname__", "__doc__")}
    built: Any = type(ours.__name__, bases, {**same, "__init__": __init__})
    return built


def _check_equal(given: Mapping[str, Any], block: GradmixConfig, everyone: ConsistencyCheck) -> None:
    """All ranks must have the same rules, and all workers the same model; DeepSpeed would hang otherwise."""
    if dist.get_world_size() == 1:
        return
    config, model = config_of(given), given.get("model")
    # A model that DeepSpeed has divided before it is handed over has parts of different shapes.
    divided = int(lookup(config, "tensor_parallel.autotp_size", 0) or 0) > 1
    words = [f"gradmix block {block!r}", f"zero_optimization {config.get('zero_optimization')!r}"]
    everyone.check_equal(tuple(words), lambda: words, "building the engine", _ADVICE)
    words = []
    for name, p in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
        dtype = str(p.dtype).removeprefix("torch.")
        shape = "a part" if divided and is_model_parallel_parameter(p) else tuple(p.shape)
        words.append(f"{name} {shape} {dtype}{'' if p.requires_grad else ' frozen'}")
    grid: Any = model.mpu() if isinstance(model, PipelineModule) else given.get("mpu")
    replicas = everyone
    if hasattr(grid, "get_data_parallel_group"):
        sets = gather_objects(dist.get_process_group_ranks(grid.get_data_parallel_group()))
        replicas = ConsistencyCheck(group_of(sorted(set(map(tuple, sets))), "gloo"))
    replicas.check_equal(tuple(words), lambda: words, "building the engine", _ADVICE)
