"""What an extrapolation rule is: how far and where to a worker looks before it takes its gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Extrapolation(BaseModel):
    """Base of all extrapolation rules; its fields are the rule's `params` in ds_config.json.

    The offset of a parameter is `scale * direction`: one number for the tensor, one direction for every
    element.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    needs_gradient: ClassVar[bool]  # of the step before, this worker's own

    @abstractmethod
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        """Directions `[C]`: from past gradients, or drawn at random in their shape, float32."""

    @abstractmethod
    def scale(self, learning_rate: float) -> float | None:
        """The scale of all parameters, at the optimizer's learning rate; None where `scales` tells."""

    def scales(
        self, weight_norms_P: Tensor, past_norms_P: Tensor, elements_P: Tensor, learning_rate: float
    ) -> Tensor:
        """The scale of every parameter, `[P]` float32, from 2-norms and sizes."""
        raise RuntimeError(f"{type(self).__name__} has one scale for all parameters")
