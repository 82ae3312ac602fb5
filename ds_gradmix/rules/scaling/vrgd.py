from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ds_gradmix.ops.segments import weighted_sum
from ds_gradmix.rules.base import Scaling

_HUGE = 1e15  # its square is still a float32


class VRGD(Scaling):
    """Variance-reduced gradient: each coordinate scaled by its gradient signal-to-noise ratio (GSNR).

    Jiang et al. 2023, arXiv 2309.13681, Algorithm 1, with worker weights w_i (1/W in the paper):

        m = sum_i w_i g_i,   v = sum_i w_i (g_i - m)^2,   r = m^2 / v
        r <- r / mean over the layer of r;   r <- clip(r, gamma, 1);   g = r * m

    `momentum` (beta3 of VR-Adam and VR-LAMB) smooths r over optimizer steps before it is used: `p_t = beta3
    p_{t-1} + (1 - beta3) r_t`, `g = p_t / (1 - beta3^t) * m`. A layer is one parameter tensor. Ours: `v = 0 <
    m^2` gives r = 1, and `v = m = 0` (an unused embedding row) is left out of the layer's mean and gets
    gamma. Everything is computed from `(g_i - m)/m`, in two passes, so no square of a gradient can over- or
    underflow.
    """

    num_statistics: ClassVar[int] = 1
    min_workers: ClassVar[int] = 8  # at W = 4 a third of all coordinates of pure noise sit on the floor

    gamma: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="smallest factor")
    momentum: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="beta3 of the paper; 0 is off")

    @property
    def factor_momentum(self) -> float:
        return self.momentum

    @property
    def idle_factor(self) -> float:
        return self.gamma

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor) -> Tensor:
        """m, and the ratio `m^2/v` before it is normalised: inf without noise, -1 without any gradient."""
        precision = torch.finfo(weights_WC.dtype)
        noiseless = (8 * precision.eps) ** 2  # v/m^2 of equal workers, as rounding leaves it
        values_WC = grads_WC.to(weights_WC.dtype)
        mean_C = weighted_sum(values_WC, weights_WC)
        divisor_C = torch.where(mean_C == 0, precision.tiny, mean_C)
        copied = values_WC is not grads_WC
        deviations_WC = values_WC.sub_(mean_C) if copied else values_WC - mean_C
        deviations_WC.div_(divisor_C).clamp_(-_HUGE, _HUGE).square_()
        noise_C = weighted_sum(deviations_WC, weights_WC)  # v / m^2
        ratio_C = torch.where(noise_C <= noiseless, float("inf"), 1.0 / noise_C)
        without_mean_C = torch.where(noise_C == 0, -1.0, 0.0)
        return torch.stack([mean_C, torch.where(mean_C == 0, without_mean_C, ratio_C)])

    def layer_terms(self, statistics_KC: Tensor) -> Tensor:
        """The ratio, with 1 in place of no noise; coordinates without any gradient are left out."""
        ratio_C = statistics_KC[1]
        idle_C = ratio_C < 0
        ratio_C = torch.where(ratio_C == float("inf"), 1.0, ratio_C)
        return torch.stack([torch.where(idle_C, 0.0, ratio_C), (~idle_C).to(ratio_C.dtype)])

    def factors(self, statistics_KC: Tensor, layer_mean_C: Tensor) -> Tensor:
        """`clip(r / layer mean, gamma, 1)`."""
        ratio_C = statistics_KC[1] / layer_mean_C.clamp(min=torch.finfo(layer_mean_C.dtype).tiny)
        return ratio_C.clamp_(self.gamma, 1.0)
