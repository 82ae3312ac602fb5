"""`check_rule` passes our own rules and such as users write, and finds each mistake that a rule may have."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ConfigDict, field_validator
from torch import Tensor

from ds_gradmix.config import SLOTS
from ds_gradmix.rules import (
    Extrapolation,
    GradientFreeMixing,
    GramianMixing,
    Mean,
    MixingDecision,
    RngKey,
    Rule,
    Scaling,
)
from ds_gradmix.testing import check_rule
from tests.support.outside_rules import Backwards, Spread, Trust, Turns, Unfinished

EXAMPLES = [example for slot in SLOTS.values() for rule in slot.known for example in rule.examples()]
COUNTER = itertools.count()


@pytest.mark.parametrize("rule", EXAMPLES, ids=repr)
def test_our_rules(rule: Rule) -> None:
    check_rule(rule)


@pytest.mark.parametrize("rule", [Trust(), Trust(decay=0.9), Turns(), Spread(), Backwards()], ids=repr)
def test_rules_from_outside(rule: Rule) -> None:
    check_rule(rule)


def equal_weights(gram_SWW: Tensor) -> Tensor:
    return torch.full(gram_SWW.shape[:2], 1.0 / gram_SWW.shape[1], dtype=torch.float64)


class Correct(GramianMixing):
    """What the broken ones below are made from: equal weights of those who are there."""

    depends_on_order: ClassVar[bool] = False

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        raw_SW = self.raw(gram_SWW) * present_W
        total_S1 = raw_SW.sum(1, keepdim=True)
        return MixingDecision(raw_SW / total_S1.clamp(min=1e-300), total_S1[:, 0] > 0)

    def raw(self, gram_SWW: Tensor) -> Tensor:
        return equal_weights(gram_SWW)


class OneWorker(Correct):
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        weights_SW, agreed_S, _ = super().decide(gram_SWW, present_W, key)
        agreed_S = agreed_S & (gram_SWW.shape[1] > 1)
        return MixingDecision(weights_SW * agreed_S[:, None], agreed_S)


class Scale(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        return 1 + gram_SWW.diagonal(dim1=1, dim2=2).sqrt()


class Order(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        return equal_weights(gram_SWW) * torch.arange(1, gram_SWW.shape[1] + 1)


class Infinite(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        return equal_weights(gram_SWW) + 0 / gram_SWW.diagonal(dim1=1, dim2=2)


class Absent(Correct):
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        return super().decide(gram_SWW, torch.ones_like(present_W), key)


class Neighbours(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        norms_SW = gram_SWW.diagonal(dim1=1, dim2=2)
        return norms_SW.sum(0) + 0 * norms_SW


class Shape(Correct):
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        weights_SW, agreed_S, _ = super().decide(gram_SWW, present_W, key)
        return MixingDecision(weights_SW[0], agreed_S)


class Single(Correct):
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        weights_SW, agreed_S, _ = super().decide(gram_SWW, present_W, key)
        return MixingDecision(weights_SW.float(), agreed_S)


class Disagreed(Correct):
    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        weights_SW, agreed_S, _ = super().decide(gram_SWW, present_W, key)
        return MixingDecision(weights_SW, agreed_S & False)


class InPlace(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        gram_SWW.mul_(0.5)
        return equal_weights(gram_SWW)


class Remembers(Correct):
    def raw(self, gram_SWW: Tensor) -> Tensor:
        return equal_weights(gram_SWW) + next(COUNTER) * torch.eye(gram_SWW.shape[1])[0]


class Undeclared(Trust):
    """Its state has a column too many."""

    def initial_state(self, num_workers: int) -> Tensor:
        return torch.zeros(1, num_workers + 1, dtype=torch.float64)


class StateInPlace(Trust):
    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        decided = super().decide_with_state(gram_SWW, present_W, key, state_KW)
        state_KW.add_(1.0)
        return decided


class StateElsewhere(Trust):
    """It goes by a count that no checkpoint has."""

    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        decision, next_SKW = super().decide_with_state(gram_SWW, present_W, key, state_KW)
        return decision, next_SKW + next(COUNTER)


class StateOfOne(Trust):
    def decide_with_state(
        self, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
    ) -> tuple[MixingDecision, Tensor]:
        decision, next_SKW = super().decide_with_state(gram_SWW, present_W, key, state_KW)
        return decision, next_SKW[0]


class NotFrozen(Correct):
    model_config = ConfigDict(frozen=False)


class NotThroughJson(Correct):
    number: float = 1.0

    @field_validator("number")
    @classmethod
    def _other(cls, number: float) -> float:
        return number + 1


class Sums(GradientFreeMixing):
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> Any:
        return np.ones((1, num_workers))


class Rows(GradientFreeMixing):
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> Any:
        return np.full((num_parameters, num_workers), 1 / num_workers)


class Redrawn(GradientFreeMixing):
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> Any:
        return np.random.default_rng().dirichlet(np.ones(num_workers), size=1)


class FreeInfinite(GradientFreeMixing):
    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> Any:
        return np.full((1, num_workers), np.nan)


class Factor(Scaling):
    """What the broken ones below are made from."""

    num_statistics: ClassVar[int] = 0

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        return mean_C.new_zeros(self.num_statistics, len(mean_C))

    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return torch.ones_like(mean_C)


class Half(Factor):
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return torch.full_like(mean_C, 0.5)


class NoiseOf(Factor):
    """1 with one worker, whose standard deviation is 0."""

    num_statistics: ClassVar[int] = 1

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        return ((grads_WC.to(mean_C.dtype) - mean_C).square() * weights_WC).sum(0, keepdim=True).sqrt()

    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return 1 / (1 + statistics_KC[0])


class NoiseRatio(NoiseOf):
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return mean_C.abs() / (mean_C.abs() + statistics_KC[0])


class FirstWorker(NoiseOf):
    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        return (grads_WC[:1].to(mean_C.dtype) * mean_C < 0).to(mean_C.dtype)


class ByTile(NoiseOf):
    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        noise_1C = super().statistics(grads_WC, weights_WC, mean_C)
        return noise_1C / noise_1C.mean(1, keepdim=True).clamp(min=1e-30)


class WrongDtype(Factor):
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return torch.ones(len(mean_C), dtype=torch.float32)


class WrongRows(Factor):
    num_statistics: ClassVar[int] = 1

    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        return torch.stack([mean_C, mean_C])


class GradsInPlace(Factor):
    def statistics(self, grads_WC: Tensor, weights_WC: Tensor, mean_C: Tensor) -> Tensor:
        grads_WC.abs_()
        return super().statistics(grads_WC, weights_WC, mean_C)


class MeanInPlace(Factor):
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return mean_C.mul_(2).new_ones(len(mean_C))


class TermsInPlace(Factor):
    def layer_terms(self, mean_C: Tensor, statistics_KC: Tensor) -> Tensor:
        return mean_C.add_(1.0)[None]


class Momentum(Factor):
    @property
    def factor_momentum(self) -> float:
        return 1.0


class Moves(Extrapolation):
    """What the broken ones below are made from."""

    needs_gradient: ClassVar[bool] = True

    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C

    def scale(self, learning_rate: float) -> float | None:
        return learning_rate


class Normalised(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C.sign()


class TileNorm(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C * len(past_C)


class Elsewhere(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return torch.randn(past_C.shape)


class Flat(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C[:1]


class Inverse(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C / past_C.sign()


class PastInPlace(Moves):
    def direction(self, past_C: Tensor, random: torch.Generator) -> Tensor:
        return past_C.mul_(2)


class ScaleInfinite(Moves):
    def scale(self, learning_rate: float) -> float:
        return 1 / learning_rate if learning_rate else float("inf")


class ScalesInfinite(Moves):
    def scale(self, learning_rate: float) -> None:
        return None

    def scales(self, norms_P: Tensor, past_norms_P: Tensor, sizes_P: Tensor, learning_rate: float) -> Tensor:
        return norms_P / past_norms_P


BROKEN: dict[type[Rule], str] = {
    OneWorker: "one worker must have weight 1",
    Scale: "gradients times .* change the decision",
    Order: "the order of workers matters",
    Infinite: "weights are not finite",
    Absent: "an absent worker has a weight",
    Neighbours: "segments depend on each other",
    Shape: "wanted .S, W.",
    Single: "weights must be float64",
    Disagreed: "weights where nobody agreed|one worker must have weight 1",
    InPlace: "decide changes its arguments",
    Remembers: "another decision when asked again",
    Unfinished: "it lacks decide",
    Undeclared: ".",
    StateInPlace: "decide_with_state changes the state",
    StateElsewhere: "another decision|after a resume it goes on otherwise",
    StateOfOne: "the next state is",
    NotFrozen: "must be frozen",
    NotThroughJson: "params differ after a way through JSON",
    Sums: "rows must sum to 1",
    Rows: "wanted float64",
    Redrawn: "others when asked again",
    FreeInfinite: "not finite",
    Half: "one worker's gradient must stay as it is",
    NoiseOf: "change the factors",
    NoiseRatio: "not finite",
    FirstWorker: "the order of workers matters",
    ByTile: "tiles matter",
    WrongDtype: "dtype",
    WrongRows: "statistics: shape",
    GradsInPlace: "statistics changes the gradients",
    MeanInPlace: "factors changes the mean",
    TermsInPlace: "layer_terms changes its arguments",
    Momentum: "factor_momentum must be",
    Normalised: "direction must grow with the gradient",
    TileNorm: "tiles matter",
    Elsewhere: "another direction by the same draws",
    Flat: "must have the shape",
    Inverse: "directions are not finite",
    PastInPlace: "direction changes its argument",
    ScaleInfinite: "scale is not finite",
    ScalesInfinite: "scales: wanted finite numbers",
}


def test_what_the_broken_ones_are_made_from_is_right() -> None:
    for rule in (Correct(), Factor(), Moves()):
        check_rule(rule)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_broken_rules_are_found(rule: type[Rule]) -> None:
    with pytest.raises(AssertionError, match=BROKEN[rule]) as caught:
        check_rule(rule())
    assert str(caught.value).startswith(repr(rule())), "it says which rule"


class Waits(Factor):
    def factors(self, mean_C: Tensor, statistics_KC: Tensor, layer_sums_LC: Tensor) -> Tensor:
        return torch.full_like(mean_C, 1.0 if mean_C.sum().item() < 2**200 else 0.0)


def test_waiting_for_the_device_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the host waits for a GPU in _local_scalar_dense"):
        check_rule(Waits())


@pytest.mark.parametrize("thing", [Mean, "GAF", None, 3], ids=repr)
def test_what_is_no_instance_of_a_rule(thing: Any) -> None:
    with pytest.raises(TypeError, match="an instance of a rule"):
        check_rule(thing)
