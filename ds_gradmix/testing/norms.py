"""What mixing rules must keep that decide by the lengths of gradients and what they observed before."""

import torch
from torch import Tensor

from ds_gradmix.rules import MixingDecision, NormMixing
from ds_gradmix.testing.gradients import SIZES, gaussian, generator, near, require, segments, stacks


def check_norms(rule: NormMixing, resumed: NormMixing) -> None:
    """Decisions from the initial state, and from one that a rule has come to by observing."""
    for name, grads_WN in stacks().items():
        gram_PWW = segments(SIZES).gram(grads_WN)
        w, whole_WW = len(grads_WN), gram_PWW.sum(0)
        state_KW = rule.initial_state(w)
        require(
            state_KW.shape[1:] == (w,) and state_KW.dtype == torch.float64, "state: wanted float64 [K, W]"
        )
        _check_decisions(rule, resumed, gram_PWW, state_KW, name)
        for _ in range(8):
            state_KW = _observe(rule, resumed, whole_WW, state_KW)
        _check_decisions(rule, resumed, gram_PWW, state_KW, f"{name}, after 8 steps")
    _check_resume(rule, resumed)


def _check_decisions(
    rule: NormMixing, resumed: NormMixing, gram_PWW: Tensor, state_KW: Tensor, name: str
) -> None:
    norms_PW, w = gram_PWW.diagonal(dim1=1, dim2=2).sqrt(), gram_PWW.shape[1]
    everyone_W = torch.ones(w, dtype=torch.bool)
    plain = _decision(rule, resumed, norms_PW, everyone_W, state_KW, name)
    if w == 1:
        require(bool((plain.weights_SW == 1).all()), "one worker must have weight 1")
    for factor in (2.0**-100, 2.0**100):
        scaled = rule.decide_from_norms(norms_PW * factor, everyone_W, state_KW)
        require(near(scaled.weights_SW, plain.weights_SW), f"{name}: gradients times {factor:g} change it")
    order = torch.randperm(w, generator=generator(w))
    numbered = rule.decide_from_norms(norms_PW[:, order], everyone_W, state_KW[:, order])
    require(near(numbered.weights_SW, plain.weights_SW[:, order]), f"{name}: the order of workers matters")
    for p in range(len(norms_PW)):
        alone = rule.decide_from_norms(norms_PW[p : p + 1], everyone_W, state_KW)
        require(near(alone.weights_SW[0], plain.weights_SW[p]), f"{name}: segments depend on each other")
    for absent in ([0], [w - 1], list(range(w))):
        present_W = everyone_W.clone()
        present_W[absent] = False
        decision = _decision(rule, resumed, norms_PW * present_W, present_W, state_KW, name)
        require(not decision.weights_SW[:, absent].any(), f"{name}: an absent worker has a weight")


def _decision(
    rule: NormMixing, resumed: NormMixing, norms_SW: Tensor, present_W: Tensor, state_KW: Tensor, name: str
) -> MixingDecision:
    """A decision of the right form, finite, and the same again and after a resume."""
    before = norms_SW.clone(), present_W.clone(), state_KW.clone()
    decision, again = (same.decide_from_norms(norms_SW, present_W, state_KW) for same in (rule, resumed))
    require(all(map(torch.equal, before, (norms_SW, present_W, state_KW))), "it changes its arguments")
    weights_SW, agreed_S = decision.weights_SW, decision.agreed_S
    require(weights_SW.shape == norms_SW.shape, f"weights are {tuple(weights_SW.shape)}, wanted [S, W]")
    require(
        agreed_S.shape == norms_SW.shape[:1] and agreed_S.dtype == torch.bool, "agreed_S: wanted bool [S]"
    )
    require(weights_SW.dtype == torch.float64, "weights must be float64, as the lengths are")
    require(weights_SW.isfinite().all(), f"{name}: weights are not finite")
    require(not weights_SW[~agreed_S].any(), f"{name}: weights where nobody agreed")
    same = torch.equal(weights_SW, again.weights_SW) and torch.equal(agreed_S, again.agreed_S)
    require(same, f"{name}: another decision when asked again, or after a resume")
    return decision


def _observe(rule: NormMixing, resumed: NormMixing, gram_WW: Tensor, state_KW: Tensor) -> Tensor:
    """The next state, of the right form, and the same after a resume."""
    before = gram_WW.clone(), state_KW.clone()
    next_KW, again_KW = (same.observe(gram_WW, state_KW) for same in (rule, resumed))
    require(all(map(torch.equal, before, (gram_WW, state_KW))), "observe changes its arguments")
    require(next_KW.shape == state_KW.shape, f"the next state is {tuple(next_KW.shape)}, wanted [K, W]")
    require(next_KW.isfinite().all() and next_KW.dtype == torch.float64, "the next state is not finite")
    require(torch.equal(next_KW, again_KW), "observe gives another state after a resume")
    for factor in (2.0**-100, 2.0**100):
        scaled_KW = rule.observe(gram_WW * factor**2, state_KW)
        require(near(scaled_KW, next_KW), f"gradients times {factor:g} change what is observed")
    return next_KW


def _check_resume(rule: NormMixing, resumed: NormMixing) -> None:
    """A run of twelve steps that goes on in another instance, against one that does not."""
    ends, present_W = [], torch.ones(5, dtype=torch.bool)
    for other in (rule, resumed):
        state_KW, weights = rule.initial_state(5), []
        for step in range(12):
            running = rule if step < 6 else other
            gram_WW = segments(SIZES).gram(gaussian(5, step)).sum(0)
            weights.append(running.decide_from_norms(gram_WW.diagonal()[None].sqrt(), present_W, state_KW)[0])
            state_KW = running.observe(gram_WW, state_KW.clone())
        ends.append((state_KW, torch.stack(weights)))
    require(all(map(torch.equal, *ends)), "after a resume it goes on otherwise")
