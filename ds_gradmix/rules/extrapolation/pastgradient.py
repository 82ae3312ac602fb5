from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.config_messages import value_text
from ds_gradmix.rules.base import Extrapolation


class PastGradient(Extrapolation):
    """Each worker takes its gradient where its own last gradient would lead it.

    Extrapolated SGD: Lin, Kong, Stich, Jaggi, ICML 2020, arXiv 2006.05720:

        delta_i = -lr g_i^(t-1),   delta_i = 0 at the first step

    with g_i the worker's own gradient of the whole step before, neither mixed nor scaled. `lr` is absolute,
    `lr_ratio` a multiple of the optimizer's current learning rate. `layerwise` makes every tensor's offset
    `lr ||theta_l||` long, as LARS would. With one worker, SGD, and lr the learning rate it is extragradient
    "from the past".
    """

    needs_gradient: ClassVar[bool] = True

    lr: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="δ = −lr · the worker's own gradient of the step before"
    )
    lr_ratio: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="lr as a multiple of the learning rate; give one of both"
    )
    layerwise: bool = Field(False, description="make every tensor's offset lr · ‖θ‖ long")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(lr=0.05), cls(lr_ratio=1.0, layerwise=True)

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if (self.lr is None) == (self.lr_ratio is None):
            lr, lr_ratio = value_text(self.lr), value_text(self.lr_ratio)
            raise ValueError(f"give exactly one of lr ({lr}) and lr_ratio ({lr_ratio})")
        return self

    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C  # the scale has the sign

    def scale(self, learning_rate: float) -> float | None:
        return None if self.layerwise else -self._step_size(learning_rate)

    def scales(self, norms_P: Tensor, past_norms_P: Tensor, sizes_P: Tensor, learning_rate: float) -> Tensor:
        """`-lr ||theta_l|| / ||g_l||`."""
        step = self._step_size(learning_rate)
        return torch.where(past_norms_P > 0, -step * norms_P / past_norms_P, 0.0)

    def _step_size(self, learning_rate: float) -> float:
        return self.lr if self.lr is not None else learning_rate * (self.lr_ratio or 0.0)
