"""What mixing rules must keep."""

import io

import numpy as np
import torch
from torch import Tensor

from ds_gradmix.rules import GradientFreeMixing, GramianMixing, Mixing, MixingDecision, RngKey
from ds_gradmix.testing.gradients import CUTS, SIZES, gaussian, generator, near, require, segments, stacks

_KEY = RngKey(1234, 7)
_KEYS = [RngKey(1234, 0), _KEY, RngKey(2**63 - 1, 2**40)]


def check_weights(rule: GradientFreeMixing, resumed: GradientFreeMixing) -> None:
    """Weights that do not depend on gradients."""
    for num_workers in (1, 2, 5, 64):
        for key in _KEYS:
            what = f"weights({key}, {num_workers}, 6)"
            weights = rule.weights(key, num_workers, 6)
            shape = (6 if rule.by_parameter else 1, num_workers)
            require(weights.shape == shape and weights.dtype == np.float64, f"{what}: wanted float64 {shape}")
            require(bool(np.isfinite(weights).all()), f"{what} are not finite")
            require(np.allclose(weights.sum(1), 1.0), f"{what}: rows must sum to 1")
            again = resumed.weights(key, num_workers, 6)
            require(bool((weights == again).all()), f"{what} are others when asked again, or after a resume")


def check_decisions(rule: GramianMixing, resumed: GramianMixing) -> None:
    """Decisions from the initial state."""
    params = segments(SIZES)
    for name, grads_WN in stacks().items():
        gram_PWW, w = params.gram(grads_WN), len(grads_WN)
        if refuses(rule, w):
            continue
        everyone_W = torch.ones(w, dtype=torch.bool)
        whole_1WW = gram_PWW.sum(0, keepdim=True)
        plain = _decision(rule, resumed, whole_1WW, everyone_W, name)
        if w == 1:
            require(plain.weights_SW.item() == 1.0 and plain.agreed_S, "one worker must have weight 1")
        for factor in (2.0**-100, 2.0**100):
            scaled = rule.decide(whole_1WW * factor**2, everyone_W, _KEY)
            require(_same(scaled, plain), f"{name}: gradients times {factor:g} change the decision")
        for cut in CUTS:
            parts = zip(grads_WN.split(cut, 1), cut, strict=True)
            tiled_1WW = torch.cat([segments([n]).gram(part_WC) for part_WC, n in parts]).sum(0, keepdim=True)
            require(_same(rule.decide(tiled_1WW, everyone_W, _KEY), plain), f"{name}: tiles matter")
        if not rule.depends_on_order:
            order = torch.randperm(w, generator=generator(w))
            numbered = rule.decide(whole_1WW[:, order][:, :, order], everyone_W, _KEY)
            require(
                near(numbered.weights_SW, plain.weights_SW[:, order]), f"{name}: the order of workers matters"
            )
        by_param = _decision(rule, resumed, gram_PWW, everyone_W, name)
        for p in range(len(SIZES)):
            alone = rule.decide(gram_PWW[p : p + 1], everyone_W, _KEY)
            require(
                near(alone.weights_SW[0], by_param.weights_SW[p]), f"{name}: segments depend on each other"
            )
        for absent in ([0], [w - 1], list(range(w))):
            present_W = everyone_W.clone()
            present_W[absent] = False
            kept_PWW = gram_PWW * present_W * present_W[:, None]
            decision = _decision(rule, resumed, kept_PWW, present_W, name)
            require(not decision.weights_SW[:, absent].any(), f"{name}: an absent worker has a weight")


def refuses(rule: Mixing, num_workers: int) -> bool:
    """Whether training refuses a rule with so many workers; one worker needs no rule."""
    return num_workers > 1 and rule.refused(num_workers) is not None


def _decision(
    rule: GramianMixing, resumed: GramianMixing, gram_SWW: Tensor, present_W: Tensor, name: str
) -> MixingDecision:
    """A decision of the right form, finite, and the same again and after a resume."""
    before = gram_SWW.clone(), present_W.clone()
    decision, again = (same.decide(gram_SWW, present_W, _KEY) for same in (rule, resumed))
    require(all(map(torch.equal, before, (gram_SWW, present_W))), "decide changes its arguments")
    weights_SW, agreed_S = decision.weights_SW, decision.agreed_S
    require(weights_SW.shape == gram_SWW.shape[:2], f"weights are {tuple(weights_SW.shape)}, wanted [S, W]")
    require(
        agreed_S.shape == gram_SWW.shape[:1] and agreed_S.dtype == torch.bool, "agreed_S: wanted bool [S]"
    )
    require(weights_SW.dtype == torch.float64, "weights must be float64, as the Gram matrices are")
    require(weights_SW.isfinite().all(), f"{name}: weights are not finite")
    require(not weights_SW[~agreed_S].any(), f"{name}: weights where nobody agreed")
    same = torch.equal(weights_SW, again.weights_SW) and torch.equal(agreed_S, again.agreed_S)
    require(same, f"{name}: another decision when asked again, or after a resume")
    return decision


def _same(a: MixingDecision, b: MixingDecision) -> bool:
    return torch.equal(a.agreed_S, b.agreed_S) and near(a.weights_SW, b.weights_SW)


def check_state(rule: GramianMixing, resumed: GramianMixing) -> None:
    """A run of six steps that is stopped in the middle, against one that is not."""
    grams = [segments(SIZES).gram(gaussian(5, seed)) for seed in range(6)]
    present_W = torch.ones(5, dtype=torch.bool)
    ends = []
    for stopped_at in (None, 3):
        running, state_KW, weights = rule, rule.initial_state(5), []
        require(
            state_KW.shape[1:] == (5,) and state_KW.dtype == torch.float64, "state: wanted float64 [K, W]"
        )
        for step, gram_SWW in enumerate(grams):
            if step == stopped_at:
                file = io.BytesIO()
                torch.save(state_KW, file)
                file.seek(0)
                running, state_KW = resumed, torch.load(file)
            before_KW = state_KW.clone()
            decision, next_SKW = running.decide_with_state(gram_SWW, present_W, RngKey(7, step), state_KW)
            require(torch.equal(state_KW, before_KW), "decide_with_state changes the state that it is given")
            wanted = (len(SIZES), *before_KW.shape)
            require(next_SKW.shape == wanted, f"the next state is {tuple(next_SKW.shape)}, wanted {wanted}")
            require(next_SKW.isfinite().all(), "the next state is not finite")
            state_KW = next_SKW.mean(0)
            weights.append(decision.weights_SW)
        ends.append((state_KW, torch.stack(weights)))
    require(all(map(torch.equal, *ends)), "after a resume it goes on otherwise")
