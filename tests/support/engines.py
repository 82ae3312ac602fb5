"""The engines that tests of a step go through, other optimizers to build them with, and what is logged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from tests.support.models import Regression
from tests.support.training import Case, ds_config

FP32_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-0 bf16": {"stage": 0, "dtype": "bf16"},
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", "config": FP32_SUMS},
    **{f"ZeRO-{stage}": {"stage": stage} for stage in (1, 2)},
    **{f"ZeRO-{stage} bf16": {"stage": stage, "dtype": "bf16"} for stage in (1, 2)},
}


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """What ds_gradmix logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_gradmix").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("ds_gradmix").removeHandler(handler)


def fused_descent() -> type[torch.optim.Optimizer]:
    """What DeepSpeed takes for its FusedAdam, and so wraps by FP16_Optimizer: plain descent."""
    from deepspeed.ops.adam import FusedAdam

    class FusedDescent(FusedAdam):  # type: ignore[misc]
        def __init__(self, params: Any, lr: float) -> None:
            torch.optim.Optimizer.__init__(self, params, {"lr": lr})

        def step(self, grads: Any = None, output_params: Any = None, scale: float = 1.0, **_: Any) -> None:
            for i, group in enumerate(self.param_groups):
                (p,) = group["params"]
                p.data.add_(p.grad if grads is None else grads[i][0].float(), alpha=-group["lr"] / scale)
                if output_params is not None:  # the legacy way
                    output_params[i][0].data.copy_(p.data)

    return FusedDescent


def build_with(
    config: dict[str, Any], model: torch.nn.Module | None = None, fused: bool = False, **kwargs: Any
) -> Any:
    import deepspeed

    import ds_gradmix

    ds_gradmix.enable()
    model = model or Regression()
    kind = fused_descent() if fused else torch.optim.SGD
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config={**ds_config(Case({})), **config}, **kwargs
    )[0]
