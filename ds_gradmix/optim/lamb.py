"""LAMB: Adam with a trust ratio for every parameter (You et al. 2020, arXiv 1904.00962, Algorithm 2)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.optim.layerwise import LayerwiseOptimizer, TileTensors, check_flag, check_number


class Lamb(LayerwiseOptimizer):
    """LAMB, by whole parameters wherever their parts lie.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay theta
        theta <- theta - lr (|theta| / |u|) u

    The ratio of the norms is 1 if either is 0. Without `bias_correction` m and v are taken as they are. It is
    Algorithm 2 with phi the identity; `min_coeff` and `max_coeff` bound the ratio instead, as in DeepSpeed's
    FusedLamb. That multiplies the whole step by sqrt(1 - beta2^t) / (1 - beta1^t), so its learning rates are
    others.

    Args:
        params: parameters, or param groups with settings of their own.
        lr: the learning rate.
        betas: beta1 and beta2.
        eps: added to the root.
        weight_decay: lambda, in the update, before the ratio is taken.
        bias_correction: whether m and v are corrected for their start at 0.
        min_coeff, max_coeff: bounds of the ratio, None for none.
        exclude_one_dimensional: whether parameters of one dimension or none (biases, weights of norms) have
            no weight decay, and a ratio of 1.

    Raises:
        ValueError: for a setting that is not allowed, beginning with its name.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        min_coeff: float | None = None,
        max_coeff: float | None = None,
        exclude_one_dimensional: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"bias_correction": bias_correction, "min_coeff": min_coeff, "max_coeff": max_coeff}
        super().__init__(params, settings | {"exclude_one_dimensional": exclude_one_dimensional})

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def check_group(self, group: Mapping[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(group, name)
        betas = group["betas"]
        if not isinstance(betas, (list, tuple)) or len(betas) != 2:
            raise ValueError(f"betas: {betas!r}, but allowed are two numbers")
        for beta in betas:
            check_number({"betas": beta}, "betas", below=1)
        for name in ("min_coeff", "max_coeff"):
            if group[name] is not None:
                check_number(group, name)
        low, high = group["min_coeff"], group["max_coeff"]
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_coeff: {low!r} is more than max_coeff {high!r}")
        for name in ("bias_correction", "exclude_one_dimensional"):
            check_flag(group, name)

    def measure(self, tile: TileTensors, group: Mapping[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        tile.state["exp_avg"].lerp_(tile.grads_C, 1 - beta1)
        tile.state["exp_avg_sq"].mul_(beta2).addcmul_(tile.grads_C, tile.grads_C, value=1 - beta2)
        return self._update(tile, group)

    def _update(self, tile: TileTensors, group: Mapping[str, Any]) -> Tensor:
        """u, with the bias corrections taken out of the fraction."""
        beta1, beta2 = group["betas"]
        numerator, root = 1.0, 1.0
        if group["bias_correction"]:
            numerator, root = 1 - beta1 ** group["step"], math.sqrt(1 - beta2 ** group["step"])
        torch.sqrt(tile.state["exp_avg_sq"], out=tile.scratch_C).add_(group["eps"] * root)
        torch.mul(tile.weights_C, tile.decay_C, out=tile.update_C)
        return tile.update_C.addcdiv_(tile.state["exp_avg"], tile.scratch_C, value=root / numerator)

    def trust_ratios(self, norms_2P: Tensor, group: Mapping[str, Any]) -> Tensor:
        weights_P, updates_P = norms_2P
        ratios_P = weights_P / updates_P
        if group["min_coeff"] is not None or group["max_coeff"] is not None:
            ratios_P = ratios_P.clamp(group["min_coeff"], group["max_coeff"])
        return torch.where((weights_P > 0) & (updates_P > 0), ratios_P, 1.0)

    def take_step(self, tile: TileTensors, ratios_C: Tensor, group: Mapping[str, Any]) -> None:
        update_C = tile.update_C if tile.keeps_update else self._update(tile, group)
        tile.weights_C.addcmul_(update_C, ratios_C, value=-group["lr"])
