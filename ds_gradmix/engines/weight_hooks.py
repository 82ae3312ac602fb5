"""Who sees the look-ahead point: training forwards and backwards do, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ds_gradmix.exchange.reducer import GradientReducer
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights


def watch(
    engine: Any, seam: GradientReducer, lookahead: ExtrapolatedWeights | None, go_ahead: Callable[[], None]
) -> None:
    """Move an engine's parameters to the look-ahead point for training, and back for everything else.

    A forward of the engine's module is training if the module is in training mode and gradients are enabled.
    Other forwards, `engine.eval()`, and whatever reads the module's state dict (checkpoints and exports do)
    see theta, and theta stays until training goes on.
    """
    if lookahead is None:
        return

    def before_forward(module: torch.nn.Module, _: Any) -> None:
        if module.training and torch.is_grad_enabled():
            lookahead.recover()
            go_ahead()
        else:
            lookahead.set_aside()

    engine.module.register_forward_pre_hook(before_forward, prepend=True)
    engine.module.register_state_dict_pre_hook(lambda *_: lookahead.set_aside())
    engine._backward_prologue = _before(go_ahead, engine._backward_prologue)
    engine.module._register_load_state_dict_pre_hook(lambda *_: lookahead.drop())
    engine.backward = _before(go_ahead, engine.backward)
    engine.eval = _before(lookahead.set_aside, engine.eval)
    engine.load_checkpoint = _warning(seam, engine.load_checkpoint)
    engine.load_module_state_dict = _before(lookahead.drop, engine.load_module_state_dict)


def _warning(seam: GradientReducer, load: Callable[..., Any]) -> Callable[..., Any]:
    """Loading a checkpoint's weights alone passes the optimizer by: tell that past gradients are missing."""

    @functools.wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = seam.state.loads
        loaded = load(*args, **kwargs)
        if loaded[0] is not None and seam.state.loads == before:
            seam.load(None, "optimizer states were not loaded")
        return loaded

    return wrapped


def _before(action: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return method(*args, **kwargs)

    return wrapped
