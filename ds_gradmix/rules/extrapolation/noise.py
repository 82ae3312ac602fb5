from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.config_messages import value_text
from ds_gradmix.rules.base import Extrapolation


class Noise(Extrapolation):
    """Each worker takes its gradient at a random point nearby: the smoothing that extrapolation is compared
    with.

    Lin, Kong, Stich, Jaggi, ICML 2020, arXiv 2006.05720: `delta_i` independent and identically distributed,
    Gaussian or uniform, of standard deviation `std`, or `std_ratio` times the root mean square of the tensor.
    Drawn anew at every step and on every rank, from (seed, rank, step).
    """

    needs_gradient: ClassVar[bool] = False

    distribution: Literal["gaussian", "uniform"] = Field("gaussian", description="which the offset has")
    std: float | None = Field(None, ge=0, allow_inf_nan=False, description="its standard deviation")
    std_ratio: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="std by each tensor's root mean square; give one of both"
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(std=0.001), cls(std_ratio=0.01, distribution="uniform")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.std is None) == (self.std_ratio is None):
            std, std_ratio = value_text(self.std), value_text(self.std_ratio)
            raise ValueError(f"give exactly one of std ({std}) and std_ratio ({std_ratio})")
        return self

    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        """Noise of standard deviation 1."""
        out_C = torch.empty_like(past_C, dtype=torch.float32)
        if self.distribution == "gaussian":
            return out_C.normal_(generator=random)
        return out_C.uniform_(-(3.0**0.5), 3.0**0.5, generator=random)

    def scale(self, learning_rate: float) -> float | None:
        return self.std

    def scales(self, norms_P: Tensor, past_norms_P: Tensor, sizes_P: Tensor, learning_rate: float) -> Tensor:
        """`std_ratio ||theta_l|| / sqrt(n_l)`."""
        return (self.std_ratio or 0.0) * norms_P / sizes_P.clamp(min=1).sqrt()
