"""LARS: momentum SGD with a trust ratio for every parameter (You et al. 2017, arXiv 1708.03888)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.optim.layerwise import LayerwiseOptimizer, TileTensors, check_flag, check_number


class Lars(LayerwiseOptimizer):
    """LARS, by whole parameters wherever their parts lie.

        q = trust_coefficient |theta| / (|g| + weight_decay |theta|)
        d = q (g + weight_decay theta)
        buf <- momentum buf + d
        theta <- theta - lr buf,   or with nesterov   theta <- theta - lr (d + momentum buf)

    q is 1 if the weights, or both norms, are 0. The learning rate is outside of the momentum, as in torch's
    SGD; in Algorithm 1 it is inside, which is the same while it does not change.

    Args:
        params: parameters, or param groups with settings of their own.
        lr: the learning rate.
        momentum: 0 keeps no buffer.
        weight_decay: lambda.
        trust_coefficient: eta.
        nesterov: whether to look ahead; needs a momentum.
        exclude_one_dimensional: whether parameters of one dimension or none (biases, weights of norms) have
            no weight decay, and q is 1.

    Raises:
        ValueError: for a setting that is not allowed, beginning with its name.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        exclude_one_dimensional: bool = True,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        settings |= {
            "trust_coefficient": trust_coefficient,
            "exclude_one_dimensional": exclude_one_dimensional,
        }
        super().__init__(params, settings)

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def check_group(self, group: Mapping[str, Any]) -> None:
        for name in ("lr", "weight_decay", "trust_coefficient"):
            check_number(group, name)
        check_number(group, "momentum", below=1)
        for name in ("nesterov", "exclude_one_dimensional"):
            check_flag(group, name)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov: True needs a momentum of more than 0")

    def measure(self, tile: TileTensors, group: Mapping[str, Any]) -> Tensor:
        return tile.grads_C

    def trust_ratios(self, norms_2P: Tensor, group: Mapping[str, Any]) -> Tensor:
        weights_P, grads_P = norms_2P
        compared_P = grads_P + group["weight_decay"] * weights_P
        ratios_P = group["trust_coefficient"] * weights_P / compared_P
        return torch.where((weights_P > 0) & (compared_P > 0), ratios_P, 1.0)

    def take_step(self, tile: TileTensors, ratios_C: Tensor, group: Mapping[str, Any]) -> None:
        update_C = torch.mul(tile.weights_C, tile.decay_C, out=tile.scratch_C)
        update_C.add_(tile.grads_C).mul_(ratios_C)
        if group["momentum"]:
            buffer_C = tile.state["momentum_buffer"].mul_(group["momentum"]).add_(update_C)
            update_C = update_C.add_(buffer_C, alpha=group["momentum"]) if group["nesterov"] else buffer_C
        tile.weights_C.add_(update_C, alpha=-group["lr"])
