"""What a mixing rule is: a frozen set of numbers that turns what is known of W workers into W weights.

A rule is one of two kinds. `KnownMixing` knows its weights before any gradient exists; `GramMixing` derives
them from the inner products of the workers' gradients. Neither touches a gradient, a process group or a step
counter.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Moment(NamedTuple):
    """When a draw is made: draws with the same moment are the same on every rank and after every resume."""

    seed: int
    step: int  # optimizer steps taken so far, skipped ones included


class Decision(NamedTuple):
    """Weights of W workers for each of S segments (the bucket, or every parameter in it)."""

    weights_SW: Tensor  # float64, rows sum to 1, or to 0 where nobody agreed
    agreed_S: Tensor  # bool


def generator(moment: Moment, stream: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by the moment; distinct streams are independent."""
    key = np.array([moment.seed, moment.step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Mixing(BaseModel):
    """Base of all mixing rules; its fields are the rule's `params` in ds_config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    needs_gram: ClassVar[bool]

    @property
    def by_parameter(self) -> bool:
        """Whether every parameter gets a row of weights of its own, whatever the scope."""
        return False


class KnownMixing(Mixing):
    """A rule whose weights do not depend on the gradients: it costs no communication."""

    needs_gram: ClassVar[bool] = False

    @abstractmethod
    def weights(self, moment: Moment, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        """Weights `[1, W]`, or `[P, W]` if `by_parameter`; rows sum to 1."""


class GramMixing(Mixing):
    """A rule that is a function of the Gram matrix `G_ij = <g_i, g_j>` alone."""

    needs_gram: ClassVar[bool] = True

    @abstractmethod
    def decide(self, gram_SWW: Tensor, present_W: Tensor, moment: Moment) -> Decision:
        """Weights from Gram matrices `[S, W, W]` (float64); a worker with `present_W` False is not there."""
