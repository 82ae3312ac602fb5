from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.costs.model import RuleCost
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
    gamma. Weights that do not sum to 1, as Adasum's, are divided by their sum in r. Everything is computed
    from `(g_i - m)/m`, in two passes, so no square of a gradient can over- or underflow.
    """

    num_statistics: ClassVar[int] = 1
    min_workers: ClassVar[int] = 8  # at W = 4 a third of all coordinates of pure noise sit on the floor

    gamma: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="smallest factor")
    momentum: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="β₃, smooths over steps; 0 is off"
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(momentum=0.9)

    @property
    def factor_momentum(self) -> float:
        return self.momentum

    @property
    def least_factor(self) -> float:
        return self.gamma

    @property
    def idle_factor(self) -> float:
        return self.gamma

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        """The relative noise `v/m^2`; where m = 0, a positive number instead if there is any noise."""
        total_C = weights_WC.sum(0)
        total_C = torch.where(total_C == 0, 1.0, total_C)
        mean_C = mean_C / total_C
        divisor_C = torch.where(mean_C == 0, torch.finfo(mean_C.dtype).tiny, mean_C)
        deviations_WC = grads_WC - mean_C  # a copy, in the mean's dtype
        deviations_WC.div_(divisor_C).clamp_(-_HUGE, _HUGE).square_()
        return (weighted_sum(deviations_WC, weights_WC) / total_C)[None]

    def layer_terms(self, mean_C: Tensor, statistics_KC: Tensor) -> Tensor:
        """The ratio, with 1 in place of no noise, and 1; coordinates without any gradient are left out."""
        ratio_C = _ratio(mean_C, statistics_KC[0])
        ratio_C = torch.where(ratio_C == float("inf"), 1.0, ratio_C)
        used_C = (mean_C != 0) | (statistics_KC[0] != 0)
        return torch.stack([torch.where(used_C, ratio_C, 0.0), used_C.to(ratio_C.dtype)])

    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        """`clip(r / layer mean, gamma, 1)`."""
        layer_mean_C = (layer_sums_LC[0] / layer_sums_LC[1].clamp(min=1)).to(mean_C.dtype)
        ratio_C = _ratio(mean_C, statistics_KC[0])
        ratio_C = ratio_C / layer_mean_C.clamp(min=torch.finfo(mean_C.dtype).tiny)
        return ratio_C.clamp_(self.gamma, 1.0)

    def cost(self, num_workers: int) -> RuleCost:
        """Four passes in float32 over the deviations, and one that sums them: 36 bytes an element."""
        return super().cost(num_workers)._replace(bytes_per_element=36.0)


def _ratio(mean_C: Tensor, noise_C: Tensor) -> Tensor:
    """`r = m^2 / v` from v/m^2: inf without noise, 0 without a mean."""
    noiseless = (8 * torch.finfo(mean_C.dtype).eps) ** 2  # v/m^2 of equal workers, as rounding leaves it
    ratio_C = torch.where(noise_C <= noiseless, float("inf"), 1.0 / noise_C)
    return torch.where(mean_C == 0, 0.0, ratio_C)
