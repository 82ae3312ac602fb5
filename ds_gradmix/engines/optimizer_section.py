"""`"optimizer": {"type": "Lamb" | "LARS"}` of ds_config.json."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_gradmix.config import ConfigError
from ds_gradmix.config_messages import unknown_key, value_text
from ds_gradmix.engines.compatibility import lookup
from ds_gradmix.optim import Lamb, Lars
from ds_gradmix.optim.layerwise import LayerwiseOptimizer

OPTIMIZERS: Mapping[str, type[LayerwiseOptimizer]] = {"lamb": Lamb, "lars": Lars}
_CLIPPING = 'set "gradient_clipping" beside the optimizer section instead'


def optimizer_of(config: Mapping[str, Any]) -> Callable[[Any], LayerwiseOptimizer] | None:
    """What makes the optimizer of the config's section from parameters, if it is one of ours.

    Raises:
        ConfigError: for its params, a line for every mistake.
    """
    kind = OPTIMIZERS.get(str(lookup(config, "optimizer.type", "")).lower())
    if kind is None:
        return None
    params = lookup(config, "optimizer.params", {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"optimizer.params: {value_text(params)}; allowed is an object of settings")
    known = [name for name in inspect.signature(kind).parameters if name != "params"]
    wrong = [
        unknown_key(
            "optimizer.params", key, value, known, _CLIPPING if key == "max_grad_norm" else "remove it"
        )
        for key, value in params.items()
        if key not in known
    ]
    given: dict[str, Any] = {key: value for key, value in params.items() if key in known}
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **given)
    except ValueError as error:
        wrong.append(f"optimizer.params.{error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return functools.partial(kind, **given)
