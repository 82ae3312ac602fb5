from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from typing_extensions import Self

from ds_gradmix.rules.base import GradientFreeMixing, RngKey


class GradientMix(GradientFreeMixing):
    """A random convex combination of the workers' gradients in place of their mean.

    GradientMix (ICLR 2023 submission, OpenReview 5c_nxk-dX1J). Written from its abstract and introduction, so
    the distribution is our choice:

        w ~ Dirichlet(alpha, ..., alpha),   w_i >= 0,   sum w_i = 1,   E w_i = 1/W

    which adds noise of covariance `S/(W alpha + 1)`, S being the biased covariance of the workers' gradients.
    With `distribution: "beta"` the workers are split at random into two halves, whose means are mixed with
    `lambda ~ Beta(alpha, alpha)`.
    """

    alpha: float = Field(
        1.0,
        gt=0,
        le=1e12,
        allow_inf_nan=False,
        description="concentration of the draw; large is near the mean",
    )
    distribution: Literal["dirichlet", "beta"] = Field(
        "dirichlet", description="one draw over all workers, or two halves"
    )
    granularity: Literal["model", "parameter"] = Field(
        "model", description="what has a draw of its own in a step"
    )
    start_step: int = Field(0, ge=0, description="first optimizer step at which it acts")
    end_step: int | None = Field(None, ge=0, description="first optimizer step at which it no longer acts")

    @model_validator(mode="after")
    def _phase_is_not_empty(self) -> Self:
        start, end = self.start_step, self.end_step
        if end is not None and end <= start:
            raise ValueError(f"end_step must be greater than start_step ({start}), got {end}")
        return self

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(distribution="beta", granularity="parameter")

    @property
    def by_parameter(self) -> bool:
        return self.granularity == "parameter"

    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        """`[1, W]` or `[P, W]`; the mean outside `[start_step, end_step)`."""
        rows = num_parameters if self.by_parameter else 1
        if key.step < self.start_step or (self.end_step is not None and key.step >= self.end_step):
            return np.full((rows, num_workers), 1.0 / num_workers)
        random = key.generator()
        if self.distribution == "dirichlet":
            return random.dirichlet(np.full(num_workers, self.alpha), size=rows)
        half = num_workers // 2
        if half == 0:
            return np.ones((rows, 1))
        share = random.beta(self.alpha, self.alpha, size=(rows, 1))
        places = random.permuted(np.tile(np.arange(num_workers), (rows, 1)), axis=1)
        return np.where(places < half, share / half, (1.0 - share) / (num_workers - half))
