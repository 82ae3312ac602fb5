"""Guard and NormClip against references by loops, and who is left out when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ds_gradmix import combine
from ds_gradmix.ops.cosines import agreement, mean_cosine, median
from ds_gradmix.rules import Guard, NormClip
from ds_gradmix.rules.apply import decide_from_norms, observe
from tests.support.gradients import block, gaussian
from tests.support.reference import agreements, guard_decision, guard_observation

EVERYONE = torch.ones(8, dtype=torch.bool)


def state_of(means: list[float], steps: int, smoothing: float = 0.9) -> torch.Tensor:
    """A state with these running means of agreement."""
    sums = torch.tensor(means, dtype=torch.float64) * (1 - smoothing**steps)
    return torch.stack([sums, torch.full_like(sums, steps)])


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8])
def test_medians_and_agreement_are_those_of_loops(workers: int) -> None:
    for seed in range(20):
        grads = gaussian(workers, seed=seed)
        grads[0] *= [1.0, 1e3, 0.0, 1e-3][seed % 4]
        gram = grads @ grads.t()
        np.testing.assert_allclose(agreement(gram).numpy(), agreements(gram.numpy()), atol=1e-7)
        values = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, workers)))
        np.testing.assert_allclose(median(values).numpy(), np.median(values.numpy(), axis=1))
        counted = torch.rand(3, workers, generator=torch.Generator().manual_seed(seed)) < 0.6
        counted[:, 0] = True
        expected = [np.median(v[c]) for v, c in zip(values.numpy(), counted.numpy(), strict=True)]
        np.testing.assert_allclose(median(values, counted).numpy(), expected)
    assert mean_cosine(torch.zeros(1, workers, workers)).tolist() == [0.0]


@pytest.mark.parametrize(
    "params", [{}, {"max_norm_ratio": 1.2, "agreement": 0.8, "smoothing": 0.6}, {"agreement": -0.5}]
)
@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_a_run_is_that_of_loops(workers: int, params: dict[str, float]) -> None:
    """Decisions and states of 30 steps, with a worker that is wrong in some, and one absent in some."""
    rule = Guard(**params)
    state, e, count = rule.initial_state(workers), np.zeros(workers), 0
    left_out = clipped = 0
    for step in range(30):
        grads = gaussian(workers, seed=100 + step, shared=0.6)
        if 8 <= step < 18:
            grads[1] *= -3.0
        present = torch.ones(workers, dtype=torch.bool)
        if step % 7 == 3:
            present[0], grads[0] = False, 0.0
        norms = grads.norm(dim=1)
        decision = decide_from_norms(rule, norms[None], present, state)
        expected = guard_decision(norms.tolist(), present.numpy(), e, count, params)
        np.testing.assert_allclose(decision.weights_SW[0].numpy(), expected, atol=1e-12)
        gram = grads @ grads.t()
        state = observe(rule, gram, state)
        e, count = guard_observation(gram.numpy(), e, count, params.get("smoothing", 0.9))
        np.testing.assert_allclose(state[0].numpy(), e, atol=1e-7)
        left_out += int(((expected == 0) & present.numpy()).sum())
        clipped += int((expected[expected > 0] < expected.max() - 1e-9).sum())
    # Of two workers neither is longer than twice their median, nor can be told from the other.
    steps = 4 if params.get("agreement", 0.5) > 0 else 2  # a low threshold is crossed late
    assert workers == 2 or (left_out >= steps and clipped > 0)


def test_weights_are_exactly_those_of_the_mean_while_there_is_nothing_to_do() -> None:
    for workers in range(2, 65):
        norms = 1 + 0.5 * torch.rand(3, workers, generator=torch.Generator().manual_seed(workers)).double()
        rule, everyone = Guard(), torch.ones(workers, dtype=torch.bool)
        state = state_of([0.2] * workers, 9)
        weights = decide_from_norms(rule, norms, everyone, state).weights_SW
        assert ((weights * workers).float() == 1.0).all()
        _, info = combine(torch.eye(workers), {})
        assert torch.equal(weights[0].float(), info["weights"].float())


OUT: dict[str, tuple[list[float], int, list[int]]] = {
    "nobody in the first five steps": ([-0.2] + [0.2] * 7, 4, []),
    "one": ([-0.2] + [0.2] * 7, 5, [0]),
    "half of them": ([0.01] * 3 + [-0.3] + [0.3] * 4, 9, [0, 1, 2, 3]),
    "nobody where the median is not above 0": ([-0.2] * 5 + [0.2] * 3, 9, []),
    "nobody who is near enough": ([0.11] + [0.2] * 7, 9, []),
}


@pytest.mark.parametrize("name", OUT)
def test_who_is_left_out(name: str) -> None:
    means, steps, expected = OUT[name]
    decision = Guard().decide_from_norms(torch.ones(1, 8).double(), EVERYONE, state_of(means, steps))
    assert torch.nonzero(decision.weights_SW[0] == 0).flatten().tolist() == expected
    assert float(decision.weights_SW.sum()) == pytest.approx(1.0)


def test_the_clip_and_its_limits() -> None:
    norms = torch.tensor([[1.0, 2.0, 3.0, 100.0]], dtype=torch.float64)
    everyone = torch.ones(4, dtype=torch.bool)
    state = Guard().initial_state(4)
    weights = Guard().decide_from_norms(norms, everyone, state).weights_SW[0] * 4
    assert weights.tolist() == [1.0, 1.0, 1.0, pytest.approx(5.0 / 100)]
    weights = NormClip().decide_from_norms(norms, everyone, state).weights_SW[0] * 4
    assert weights.tolist() == [1.0, 1.0, pytest.approx(2.5 / 3), pytest.approx(0.025)]
    idle = torch.tensor([[0.0, 0.0, 0.0, 7.0]], dtype=torch.float64)  # an expert that one worker used
    assert (NormClip().decide_from_norms(idle, everyone, state).weights_SW == 0.25).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    grads = gaussian(4, seed=1)
    grads[2, 5] = bad
    for rule in ("Guard", "NormClip"):
        combined, _ = combine(grads, block(rule))
        assert combined.isnan().all()
        kept, info = combine(grads, block(rule, nonfinite="drop"))
        assert kept.isfinite().all() and info["weights"][2] == 0
    state = state_of([0.1, 0.2, 0.3, 0.4], 7)
    assert torch.equal(observe(Guard(), grads @ grads.t(), state), state)


def test_combine_clips_by_scope() -> None:
    grads = gaussian(5, seed=4)
    grads[1, :7] *= 1000
    sizes = [7, grads.shape[1] - 7]
    _, whole = combine(grads, block("Guard"), sizes=sizes)
    _, parts = combine(grads, block("Guard", scope="parameter"), sizes=sizes)
    assert whole["weights"][1] < 0.2 / 10
    assert parts["weights"][0, 1] < 0.2 / 10 and parts["weights"][1, 1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "params",
    [{"max_norm_ratio": 0.9}, {"agreement": 1.0}, {"agreement": -1.1}, {"smoothing": 1}, {"beta": 1}],
)
def test_params_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"gradmix\.mixing\.params"):
        combine(gaussian(2), {"mixing": {"type": "guard", "params": params}})
