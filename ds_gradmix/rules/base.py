"""The bases of all rules: frozen sets of numbers with pure functions of tensors.

A rule touches no process group, no optimizer and no step counter, so it can be tested, read and invented
without a cluster. Its fields are its `params` in ds_config.json.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.rules.decision import Considered, MixingDecision


class RngKey(NamedTuple):
    """Keys everything drawn at random: the same key draws the same on every rank and after every resume."""

    seed: int
    step: int  # optimizer steps taken so far, skipped ones included

    def generator(self, stream: int = 0) -> np.random.Generator:
        """A counter-based generator (Philox); distinct streams of one key are independent."""
        key = np.array([self.seed, self.step], dtype=np.uint64)
        counter = np.array([0, 0, 0, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


class WrongParam(ValueError):
    """A value of a rule's `params` that is not allowed: its name, what is allowed, and what to do."""

    def __init__(self, name: str, allowed: str, advice: str) -> None:
        super().__init__(f"{name}: allowed: {allowed}; {advice}")
        self.name, self.allowed, self.advice = name, allowed, advice


class Rule(BaseModel):
    """Base of the rules of all slots."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def type_name(cls) -> str:
        """What `type` in the block calls this class: its name, or `package.module:Class` if not ours."""
        ours = cls.__module__.startswith("ds_gradmix.rules.")
        return cls.__name__ if ours else f"{cls.__module__}:{cls.__qualname__}"

    def __repr_name__(self) -> str:
        return self.type_name()

    @classmethod
    def params_class(cls, params: Mapping[Any, object]) -> type[Self]:
        """The class whose fields `params` are: this one, unless the fields depend on what is given.

        Raises:
            WrongParam: if no class has such fields.
        """
        return cls

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Instances that tests, documents and the benchmark use; the first is the usual one. None if the
        rule needs a package that is not installed.
        """
        return (cls(),)

    def cost(self, num_workers: int) -> RuleCost:
        """What this rule adds to a reduction, for `ds_gradmix check`; nothing unless it says so."""
        return RuleCost()


class Mixing(Rule):
    """Base of the rules that give workers weights.

    A rule is one of three kinds: `GradientFreeMixing` knows its weights before any gradient exists,
    `NormMixing` derives them from the lengths of the workers' gradients and what it saw in the steps before,
    and `GramianMixing` from the inner products of the workers' gradients.
    """

    depends_on_gradients: ClassVar[bool] = True
    needs_gram: ClassVar[bool]
    may_skip: ClassVar[bool] = True  # whether it may decide that nobody agrees, so that a step is left out
    observes: ClassVar[bool] = False  # whether it is shown the Gram matrix of the whole model in each step

    def initial_state(self, num_workers: int) -> Tensor:
        """What the rule keeps of each worker before the first step: `[K, W]`, float64. K is 0 by default."""
        return torch.zeros(0, num_workers, dtype=torch.float64)

    def refused(self, num_workers: int) -> WrongParam | None:
        """Which param does not fit so many workers, of which there are 2 or more; None if all do."""
        return None

    @property
    def by_parameter(self) -> bool:
        """Whether every parameter gets a row of weights of its own, whatever the scope."""
        return False


class GradientFreeMixing(Mixing):
    """A rule whose weights do not depend on the gradients, so that it costs no communication."""

    depends_on_gradients: ClassVar[bool] = False
    may_skip: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False

    @abstractmethod
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        """Weights `[1, W]`, or `[P, W]` if `by_parameter`; rows sum to 1."""


class NormMixing(Mixing):
    """A rule that looks at the lengths of the workers' gradients, and back at the steps before.

    Its decision takes W numbers of each bucket (where a worker has several ranks, whose gradients have a sum
    that no rank has, a sketch of it), and never waits for a Gram matrix. A rule that `observes` is
    shown that of the whole model's gradients once a step, when they are reduced, and may keep K numbers of
    each worker by it: `initial_state` gives them before the first step, `observe` moves them on. Where its
    weights are all exactly `1/W` the result is bit for bit that of `Mean`.
    """

    needs_gram: ClassVar[bool] = False

    @abstractmethod
    def decide_from_norms(self, norms_SW: Tensor, present_W: Tensor, state_KW: Tensor) -> MixingDecision:
        """Decide for S segments from 2-norms `[S, W]`, float64, and the state that the step before left;
        workers whose gradient is not finite are left out where `present_W`, bool, is False, and have norm 0.
        """

    def observe(self, gram_WW: Tensor, state_KW: Tensor) -> Tensor:
        """The next state `[K, W]`, from the Gram matrix `[W, W]`, float64, of the whole model's gradients.

        Of gradients that come in several reductions a step it is the sum of their Gram matrices. It is
        finite; a step without finite gradients, or one that is skipped, leaves the state as it was.
        """
        return state_KW


class GramianMixing(Mixing):
    """A rule that is a function of the Gram matrix `G_ij = <g_i, g_j>` alone.

    A rule without state has `decide`. One that keeps K numbers of each worker over steps has `initial_state`
    and `decide_with_state` instead, which is what training calls.
    """

    needs_gram: ClassVar[bool] = True
    depends_on_order: ClassVar[bool] = False  # whether a permutation of the workers may change their weights

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Decide for S segments from Gram matrices `[S, W, W]`, float64; workers whose gradient is not finite
        are left out where `present_W`, bool, is False. Segments are decided independently of each other.
        """
        state_KW = self.initial_state(gram_SWW.shape[1]).to(gram_SWW.device)
        return self.decide_with_state(gram_SWW, present_W, key, state_KW)[0]

    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        """The decision, and the next state `[S, K, W]` as each segment would have it.

        All decisions of a step are given the same state. After a step that was taken it becomes the mean of
        what they returned, weighted by their elements; a skipped step leaves it as it was.
        """
        return self.decide(gram_SWW, present_W, key), state_KW.expand(len(gram_SWW), *state_KW.shape)

    def consider(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor) -> Considered:
        """`decide_with_state`, and by how much cosines missed thresholds, for a rule that has some."""
        decision, next_state_SKW = self.decide_with_state(gram_SWW, present_W, key, state_KW)
        return Considered(decision, torch.full_like(gram_SWW[:, 0, 0], float("inf")), next_state_SKW)


class Scaling(Rule):
    """Base of the rules that give every coordinate a factor, by which the weighted mean is multiplied.

    Three functions of C coordinates, which may lie in any parameters:

        statistics    K numbers a coordinate, from all workers' gradients
        layer_terms   L numbers a coordinate, which are summed over its whole parameter (L may be 0)
        factors       from the mean, the statistics and these sums
    """

    min_workers: ClassVar[int] = 1  # with fewer, rank 0 warns
    num_statistics: ClassVar[int]  # K

    @property
    def num_layer_terms(self) -> int:
        """L, as many rows as `layer_terms` returns."""
        return len(self.layer_terms(torch.zeros(0), torch.zeros(self.num_statistics, 0)))

    @property
    def factor_momentum(self) -> float:
        """Decay of the factors' running mean over optimizer steps; 0 for none, and then there is no state."""
        return 0.0

    @property
    def least_factor(self) -> float | None:
        """The smallest factor that a coordinate can have, if the rule has one."""
        return None

    @property
    def idle_factor(self) -> float:
        """Factor of a coordinate that was not reduced in a step, in the running mean."""
        return 1.0

    @abstractmethod
    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        """Statistics `[K, C]`, in the dtype of the mean.

        Args:
            grads_WC: gradients `[W, C]` in any dtype, which must not be changed.
            weights_WC: the workers' weights, `[W, C]` or `[W, 1]`, float32 or float64.
            mean_C: `sum_i w_i g_i`, `[C]`, in the dtype of the weights.
        """

    def layer_terms(self, mean_C: Tensor, statistics_KC: Tensor) -> Tensor:
        """What each coordinate adds to the sums of its parameter: `[L, C]`; none by default."""
        return mean_C.new_zeros(0, len(mean_C))

    @abstractmethod
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        """Factors `[C]`, in the dtype of the mean.

        Args:
            mean_C: as given to `statistics`; not to be changed.
            statistics_KC: what `statistics` returned.
            layer_sums_LC: the sums of `layer_terms` over each coordinate's parameter, float64, `[L, C]` or
                `[L, 1]`.
        """

    def cost(self, num_workers: int) -> RuleCost:
        """The sums over parameters, and for each statistic one pass over the gradients that reads them,
        writes float32 and reads that.
        """
        return RuleCost(layer_terms=self.num_layer_terms, bytes_per_element=12.0 * self.num_statistics)


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
