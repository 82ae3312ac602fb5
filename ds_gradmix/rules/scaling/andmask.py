from typing import ClassVar

from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.ops.segments import weighted_sum
from ds_gradmix.rules.base import Scaling


class AndMask(Scaling):
    """A coordinate counts only where enough workers' gradients have the same sign.

    The AND-mask of Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329:

        r = 1 if |sum_i sign g_i| >= threshold * W, else 0

    With threshold 1 all workers must agree, with 0 every coordinate counts. Ours: workers that `mixing` gave
    weight 0 are not counted, in W neither; and the default threshold.
    """

    num_statistics: ClassVar[int] = 1

    threshold: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="least agreement of signs")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(threshold=1.0)

    @property
    def least_factor(self) -> float:
        return 0.0

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        """The agreement `|sum_i sign g_i| / W`."""
        counted_WC = (weights_WC != 0).to(mean_C.dtype)
        signs_C = weighted_sum(grads_WC.sign().to(mean_C.dtype), counted_WC)
        return (signs_C.abs() / counted_WC.sum(0).clamp(min=1))[None]

    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        """1 where the agreement reaches the threshold, else 0."""
        return (statistics_KC[0] >= self.threshold).to(mean_C.dtype)
