"""LAMB and LARS parameter by parameter, in float64, from their formulas alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Settings = Mapping[str, Any]
# With which small models train for a dozen steps.
LAMB: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}  # not to divide noise by noise
LARS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "trust_coefficient": 0.2}


def lamb(theta: Any, g: Any, state: dict[str, Any], given: Settings, t: int) -> torch.Tensor:
    """The weights of one parameter after a step t, counted from 1; the state moves on."""
    beta1, beta2 = given.get("betas", (0.9, 0.999))
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    if given.get("bias_correction", True):
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    u = m / (torch.sqrt(v) + given.get("eps", 1e-6)) + _decay(theta, given) * theta
    ratio = 1.0
    if not _is_plain(theta, given) and theta.norm() > 0 and u.norm() > 0:
        ratio = float(theta.norm() / u.norm())
        ratio = min(max(ratio, given.get("min_coeff", 0.0)), given.get("max_coeff", math.inf))
    return torch.as_tensor(theta - given["lr"] * ratio * u)


def lars(theta: Any, g: Any, state: dict[str, Any], given: Settings, t: int) -> torch.Tensor:
    """The same of LARS."""
    decay, momentum = _decay(theta, given), given.get("momentum", 0.9)
    compared, q = float(g.norm() + decay * theta.norm()), 1.0
    if not _is_plain(theta, given) and theta.norm() > 0 and compared > 0:
        q = given.get("trust_coefficient", 0.001) * float(theta.norm()) / compared
    d = q * (g + decay * theta)
    buf = state["buf"] = momentum * state.get("buf", 0.0) + d
    return torch.as_tensor(theta - given["lr"] * (d + momentum * buf if given.get("nesterov") else buf))


def _is_plain(theta: Any, given: Settings) -> bool:
    return bool(given.get("exclude_one_dimensional", True)) and theta.dim() <= 1


def _decay(theta: Any, given: Settings) -> float:
    return 0.0 if _is_plain(theta, given) else float(given.get("weight_decay", 0.0))


FORMULAS = {"Lamb": lamb, "LARS": lars}


class ByFormula(torch.optim.Optimizer):
    """One of them as an optimizer."""

    def __init__(self, params: Any, kind: str, **given: Any) -> None:
        super().__init__(params, given)
        self._formula, self._steps = FORMULAS[kind], 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self._formula(p.clone(), p.grad, self.state[p], group, self._steps))
