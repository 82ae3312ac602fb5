"""Who sees the extrapolated weights: training forwards and backwards do, and nothing else."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ds_gradmix.engines.gathered_weights import GatheredWeights
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights


def attach(
    engine: Any,
    extrapolated: ExtrapolatedWeights | GatheredWeights,
    extrapolate: Callable[[], None],
    reload: Callable[[str], None],
    loads: Callable[[], int],
) -> None:
    """Extrapolate an engine's parameters for training, and set the offset aside for everything else.

    A forward of the engine's module is training if the module is in training mode and gradients are enabled,
    and a backward is, if one of the step's forwards was. Other forwards, `engine.eval()`, and whatever reads
    the module's state dict (checkpoints and exports do) see theta, and theta stays until training goes on.

    Args:
        extrapolate: calls `extrapolated.extrapolate`.
        reload: is given the reason why a loaded checkpoint has no state for `extrapolated`.
        loads: how many times state was loaded, or `reload` called.
    """
    watch = _Watch(extrapolated, extrapolate)
    module = engine.module
    handles = (
        module.register_forward_pre_hook(_ModuleHook(watch.before_forward), prepend=True),
        module.register_forward_hook(_ModuleHook(watch.after_forward), always_call=True),
        module.register_state_dict_pre_hook(_ModuleHook(lambda _: extrapolated.set_aside())),
        module.register_load_state_dict_pre_hook(_ModuleHook(lambda _: extrapolated.drop())),
    )
    engine._backward_prologue = _before(watch.before_backward, engine._backward_prologue)
    engine.backward = _before(watch.before_backward, engine.backward)
    engine.step = _after(watch.after_step, engine.step)
    engine.eval = _before(extrapolated.set_aside, engine.eval)
    engine.load_module_state_dict = _before(extrapolated.drop, engine.load_module_state_dict)
    engine.load_checkpoint = _reloading(engine.load_checkpoint, reload, loads)
    # The module may go on without this engine.
    engine.destroy = _before(lambda: [handle.remove() for handle in handles], engine.destroy)


class _Watch:
    """Which forward and backward is training."""

    def __init__(
        self, extrapolated: ExtrapolatedWeights | GatheredWeights, extrapolate: Callable[[], None]
    ) -> None:
        self._extrapolated = extrapolated
        self._extrapolate = extrapolate
        self._depth = 0  # of forwards that the module calls of itself, which are part of the outermost one
        self._trains = False  # a forward of this step did

    def before_forward(self, module: torch.nn.Module) -> None:
        """The engine's module is called."""
        self._depth += 1
        if self._depth > 1:
            return
        if module.training and torch.is_grad_enabled():
            self._trains = True
            self._extrapolated.recover()
            self._extrapolate()
        else:
            self._extrapolated.set_aside()

    def after_forward(self, module: torch.nn.Module) -> None:
        """It has returned, or raised."""
        self._depth -= 1

    def before_backward(self) -> None:
        """A backward begins."""
        if self._trains:
            self._extrapolate()

    def after_step(self) -> None:
        """A micro-step, or step, is over."""
        self._trains = False


class _ModuleHook:
    """A hook of an engine's module; it does nothing in a copy of the module, whose parameters are others."""

    def __init__(self, action: Callable[[torch.nn.Module], None] = lambda _: None) -> None:
        self._action = action

    def __call__(self, module: torch.nn.Module, *_: Any) -> None:
        self._action(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModuleHook, ()


def _reloading(load: Any, reload: Callable[[str], None], loads: Callable[[], int]) -> Callable[..., Any]:
    """Loading a checkpoint's weights alone passes the optimizer by, so past gradients are missing then."""

    @functools.wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = loads()
        loaded = load(*args, **kwargs)
        if loaded[0] is not None and loads() == before:
            reload("optimizer states were not loaded")
        return loaded

    return wrapped


def _before(action: Callable[[], object], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return method(*args, **kwargs)

    return wrapped


def _after(action: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        action()
        return result

    return wrapped
