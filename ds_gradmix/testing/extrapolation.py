"""What extrapolation rules must keep."""

import math

import torch

from ds_gradmix.rules import Extrapolation
from ds_gradmix.testing.gradients import CUTS, DTYPES, generator, in_dtype, near, require, stacks


def check_extrapolation(rule: Extrapolation, resumed: Extrapolation) -> None:
    """Directions from past gradients in every dtype, and their scale."""
    for name, grads_WN in stacks().items():
        for dtype in DTYPES[1:]:
            past_C = in_dtype(grads_WN[0], dtype)
            before_C = past_C.clone()
            found_C = rule.direction(past_C, generator(1)).float()
            require(torch.equal(past_C, before_C), "direction changes its argument")
            require(found_C.shape == past_C.shape, "direction must have the shape of the gradient")
            require(found_C.isfinite().all(), f"{name}: directions are not finite")
            again_C = resumed.direction(past_C, generator(1)).float()
            require(torch.equal(found_C, again_C), "another direction by the same draws, or after a resume")
        _check_gradient(rule, grads_WN[0].float(), name)
    norms_P, past_norms_P = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 1.0, 0.0, 1e20]])
    sizes_P = torch.tensor([0.0, 3.0, 4.0, 5.0])
    for learning_rate in (0.0, 1e-3):
        scale = rule.scale(learning_rate)
        if scale is None:
            scales_P = rule.scales(norms_P, past_norms_P, sizes_P, learning_rate)
            require(scales_P.shape == (4,) and scales_P.isfinite().all(), "scales: wanted finite numbers [P]")
        else:
            require(math.isfinite(scale), "scale is not finite")


def _check_gradient(rule: Extrapolation, past_C: torch.Tensor, name: str) -> None:
    """Rules that go by the gradient alone, which is scaled with the loss and given in tiles."""
    found_C = rule.direction(past_C, generator(1)).float()
    if not rule.needs_gradient or not torch.equal(found_C, rule.direction(past_C, generator(2)).float()):
        return
    for cut in CUTS:
        parts = [rule.direction(part_C, generator(1)).float() for part_C in past_C.split(cut)]
        require(torch.equal(torch.cat(parts), found_C), f"{name}: tiles matter")
    scaled_C = rule.direction(past_C * 2.0**8, generator(1)).float()
    require(near(scaled_C, found_C * 2.0**8), f"{name}: direction must grow with the gradient (loss scaling)")
