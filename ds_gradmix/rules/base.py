"""The bases of all rules: frozen sets of numbers with pure functions of tensors.

A rule touches no process group, no optimizer and no step counter, so it can be tested, read and invented
without a cluster. Its fields are its `params` in ds_config.json.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ds_gradmix.rules.decision import MixingDecision


class RngKey(NamedTuple):
    """Keys everything drawn at random: the same key draws the same on every rank and after every resume."""

    seed: int
    step: int  # optimizer steps taken so far, skipped ones included

    def generator(self, stream: int = 0) -> np.random.Generator:
        """A counter-based generator (Philox); distinct streams of one key are independent."""
        key = np.array([self.seed, self.step], dtype=np.uint64)
        counter = np.array([0, 0, 0, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Rule(BaseModel):
    """Base of the rules of all slots."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Mixing(Rule):
    """Base of the rules that give workers weights.

    A rule is one of two kinds: `GradientFreeMixing` knows its weights before any gradient exists, and
    `GramianMixing` derives them from the inner products of the workers' gradients.
    """

    needs_gram: ClassVar[bool]

    @property
    def by_parameter(self) -> bool:
        """Whether every parameter gets a row of weights of its own, whatever the scope."""
        return False


class GradientFreeMixing(Mixing):
    """A rule whose weights do not depend on the gradients, so that it costs no communication."""

    needs_gram: ClassVar[bool] = False

    @abstractmethod
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        """Weights `[1, W]`, or `[P, W]` if `by_parameter`; rows sum to 1."""


class GramianMixing(Mixing):
    """A rule that is a function of the Gram matrix `G_ij = <g_i, g_j>` alone."""

    needs_gram: ClassVar[bool] = True

    @abstractmethod
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Decide for S segments from Gram matrices `[S, W, W]`, float64; workers whose gradient is not finite
        are left out where `present_W`, bool, is False.
        """


class Scaling(Rule):
    """Base of the rules that give every coordinate a factor.

    Statistics of C coordinates are a tensor `[1 + K, C]`: the first row is the weighted mean over the
    workers, and the others are the rule's own.
    """

    min_workers: ClassVar[int] = 1  # with fewer, rank 0 warns
    num_statistics: ClassVar[int]  # K

    @property
    def factor_momentum(self) -> float:
        """Decay of the factors' running mean over optimizer steps; 0 for none, and then there is no state."""
        return 0.0

    @property
    @abstractmethod
    def idle_factor(self) -> float:
        """Factor of a coordinate that has no gradient at all."""

    @abstractmethod
    def statistics(self, grads_WC: Tensor, weights_WC: Tensor) -> Tensor:
        """Statistics `[1 + K, C]` of gradients `[W, C]`, of any dtype, which are not changed; computed in the
        dtype of the weights `[W, C]` or `[W, 1]`, float32 or float64.
        """

    @abstractmethod
    def layer_terms(self, statistics_KC: Tensor) -> Tensor:
        """What each coordinate adds to its layer's sum, and to the count it is divided by: `[2, C]`."""

    @abstractmethod
    def factors(self, statistics_KC: Tensor, layer_mean_C: Tensor) -> Tensor:
        """Factors `[C]` from the statistics and the mean over each coordinate's layer (`[C]` or `[1]`)."""


class Extrapolation(Rule):
    """Base of the rules that move a worker's weights before it takes its gradient.

    The offset of a parameter is `scale * direction`: a number for the tensor, and a direction of its shape.
    """

    needs_gradient: ClassVar[bool]  # of the step before, this worker's own

    @abstractmethod
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        """Directions `[C]`: from past gradients, or drawn at random in their shape, float32."""

    @abstractmethod
    def scale(self, learning_rate: float) -> float | None:
        """The scale of all parameters at the optimizer's learning rate; None where `scales` gives it."""

    def scales(self, norms_P: Tensor, past_norms_P: Tensor, sizes_P: Tensor, learning_rate: float) -> Tensor:
        """The scale of every parameter, `[P]` float32, from 2-norms, of its past gradient too, and sizes."""
        raise RuntimeError(f"{type(self).__name__} has one scale for all parameters")
