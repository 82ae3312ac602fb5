"""The rules against loop-written float64 references, their known limits, and a table of nasty inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ds_gradmix import combine
from ds_gradmix.rules import GAF, GradientMix, RngKey
from tests.support.gradients import ANY_SUM, MIN_WORKERS, NASTY, RULES, SIZES, N, block, gaussian, rows
from tests.support.outside_rules import MODULE
from tests.support.reference import and_mask, gaf_weights, philox, spread, trust, vrgd
from tests.support.solo import Launches


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
@pytest.mark.parametrize("merge", ["mean", "midpoint"])
@pytest.mark.parametrize("threshold", [0.7, 0.95, 1.0, 1.05])
def test_gaf_weights(workers: int, merge: str, threshold: float) -> None:
    for seed, order in itertools.product(range(4), ["rank", "shuffled"]):
        grads = gaussian(workers, seed=seed)
        given = philox(99, 5, 1).permutation(workers).tolist() if order == "shuffled" else None
        expected, agreed = gaf_weights(rows(grads), threshold, merge, given)
        rule = block("GAF", threshold=threshold, merge=merge, order=order, seed=99)
        combined, info = combine(grads, rule, step=5)
        np.testing.assert_allclose(info["weights"].numpy(), expected, atol=1e-12)
        assert info["skipped"] == (not agreed)
        np.testing.assert_allclose(combined.numpy(), expected @ grads.numpy(), atol=1e-12)


@pytest.mark.parametrize("merge", ["mean", "midpoint"])
def test_gaf_with_threshold_2_keeps_everybody_also_when_gradients_cancel(merge: str) -> None:
    for seed in range(40):
        u, v, w = gaussian(3, seed=seed, shared=0.0)
        stack = torch.stack([u, v, -(u + v), w, torch.zeros(N, dtype=torch.float64)])
        _, info = combine(stack, block("GAF", threshold=2.0, merge=merge, order="rank"))
        assert (info["weights"] > 0).all()


@pytest.mark.parametrize("merge", ["mean", "midpoint"])
@pytest.mark.parametrize("workers", [8, 512])
def test_gaf_decides_with_few_launches(workers: int, merge: str) -> None:
    """No more than docs/scaling.md reckons with, of which two are a GPU's: the order, and the program."""
    gram = torch.eye(workers, dtype=torch.float64)[None]
    rule, present = GAF(merge=merge), torch.ones(workers, dtype=torch.bool)
    with Launches() as launches:
        rule.decide(gram, present, RngKey(1, 2))
    assert launches.count <= GAF().cost(workers).launches - 2


@pytest.mark.parametrize("merge", ["mean", "midpoint"])
def test_gaf_of_many_workers(merge: str) -> None:
    """Judged all at once, they are as one after another, also where each decision hangs on those before."""
    for workers, shared in ((40, 0.0), (40, 0.1), (130, 0.02)):
        grads = gaussian(workers, seed=workers, shared=shared)
        expected, agreed = gaf_weights(rows(grads), 1.0, merge, list(range(workers)))
        gram = (grads @ grads.t())[None]
        rule = GAF(merge=merge, order="rank")
        decision = rule.decide(gram, torch.ones(workers, dtype=torch.bool), RngKey(1, 2))
        np.testing.assert_allclose(decision.weights_SW[0].numpy(), expected, atol=1e-12)
        assert bool(decision.agreed_S) == agreed and 0.2 < (expected > 0).mean() < 0.9


def test_margins_are_the_least_distance_from_the_threshold() -> None:
    grads = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.0, 0, 1]], dtype=torch.float64)
    key, present, state = RngKey(1, 2), torch.ones(3, dtype=torch.bool), torch.zeros(0, 3)
    rule = GAF(threshold=0.5, order="rank")  # cosines 0.6 with the first, 0 with their sum
    assert float(rule.consider((grads @ grads.t())[None], present, key, state).margin_S) == pytest.approx(0.1)
    present[1] = False
    assert float(rule.consider((grads @ grads.t())[None], present, key, state).margin_S) == pytest.approx(0.5)
    present[2] = False
    assert float(rule.consider((grads @ grads.t())[None], present, key, state).margin_S) == float("inf")


def test_gaf_by_parameter() -> None:
    grads = gaussian(4, seed=3)
    rule = block("GAF", threshold=0.95, order="rank", scope="parameter")
    combined, info = combine(grads, rule, sizes=SIZES)
    parts = grads.split(SIZES, dim=1)
    expected = [gaf_weights(rows(part), 0.95)[0] if part.shape[1] else np.zeros(4) for part in parts]
    np.testing.assert_allclose(info["weights"].numpy(), np.stack(expected), atol=1e-12)
    mixed = np.concatenate([w @ part.numpy() for w, part in zip(expected, parts, strict=True)])
    np.testing.assert_allclose(combined.numpy(), mixed, atol=1e-12)
    assert len({tuple(row) for row in expected}) > 2  # parameters do differ


def test_gaf_disagreement() -> None:
    grads = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    combined, info = combine(grads, block("GAF", threshold=0.9))
    assert info["skipped"] and combined.tolist() == [0.0, 0.0] and info["weights"].tolist() == [0.0, 0.0]
    combined, info = combine(grads, block("GAF", threshold=0.9, on_disagreement="mean"))
    assert not info["skipped"] and torch.equal(combined, grads.mean(0))


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
def test_vrgd_factors(workers: int, gamma: float) -> None:
    grads = gaussian(workers, seed=workers)
    grads[:, 20] = 0.0  # an unused coordinate
    grads[:, 30] = 0.25  # a coordinate without noise
    mean, factors = vrgd(rows(grads), np.full(workers, 1 / workers), SIZES, gamma)
    combined, info = combine(grads, block(scaling={"gamma": gamma}), sizes=SIZES)
    np.testing.assert_allclose(info["factors"].numpy(), factors, rtol=1e-9)
    np.testing.assert_allclose(combined.numpy(), factors * mean, rtol=1e-9, atol=1e-15)
    # float32 differs by the rounding of sums over a layer
    single, _ = combine(grads.float(), block(scaling={"gamma": gamma}), sizes=SIZES)
    np.testing.assert_allclose(single.numpy(), factors * mean, rtol=2e-4, atol=1e-6)


def test_vrgd_under_gaf_weights() -> None:
    grads = gaussian(5, seed=11)
    weights, _ = gaf_weights(rows(grads), 0.95)
    assert 0 in weights
    mean, factors = vrgd(rows(grads), weights, SIZES, 0.1)
    rule = block("GAF", {"gamma": 0.1}, threshold=0.95, order="rank")
    combined, _ = combine(grads, rule, sizes=SIZES)
    np.testing.assert_allclose(combined.numpy(), factors * mean, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_andmask(workers: int, threshold: float) -> None:
    grads = gaussian(workers, seed=workers)
    grads[:, 20] = 0.0  # an unused coordinate
    grads[0, 21:40] = 0.0  # a worker without an opinion
    for mixing in (None, "GAF"):
        rule = block(mixing, order="rank", threshold=0.95) if mixing else {}
        rule["scaling"] = {"type": "AndMask", "params": {"threshold": threshold}}
        combined, info = combine(grads, rule, sizes=SIZES)
        mean, factors = and_mask(rows(grads), info["weights"].numpy(), threshold)
        assert info["factors"].tolist() == factors.tolist()
        np.testing.assert_allclose(combined.numpy(), factors * mean, rtol=1e-9, atol=1e-15)
        assert threshold == 0.0 or 0 < factors.sum() < N


def test_rules_from_outside() -> None:
    grads = gaussian(5, seed=1)
    weights, _, _ = trust(rows(grads), np.zeros(5), 0.5)
    mean, factors = spread(rows(grads), weights, SIZES)
    rule = {"mixing": {"type": f"{MODULE}:Trust"}, "scaling": {"type": f"{MODULE}:Spread"}}
    combined, info = combine(grads, rule, sizes=SIZES)
    np.testing.assert_allclose(info["weights"].numpy(), weights, rtol=1e-9)
    np.testing.assert_allclose(combined.numpy(), factors * mean, rtol=1e-9, atol=1e-15)


def test_gradientmix_draws() -> None:
    """Dirichlet: convex, mean 1/W, variance (1/W)(1 - 1/W)/(W alpha + 1); beta: two halves."""
    for alpha in (0.3, 1.0, 20.0):
        rule = GradientMix(alpha=alpha)
        draws = np.concatenate([rule.weights(RngKey(7, step), 4, 1) for step in range(4000)])
        assert (draws >= 0).all()
        np.testing.assert_allclose(draws.sum(1), 1.0)
        # 4000 draws: the standard error of the mean is below 0.007, that of the variance below 5 %
        np.testing.assert_allclose(draws.mean(0), 0.25, atol=0.03)
        np.testing.assert_allclose(draws.var(0), 0.25 * 0.75 / (4 * alpha + 1), rtol=0.2)
    beta = np.concatenate(
        [GradientMix(alpha=1.0, distribution="beta").weights(RngKey(7, s), 5, 1) for s in range(4000)]
    )
    np.testing.assert_allclose(beta.sum(1), 1.0)
    np.testing.assert_allclose(beta.mean(0), 0.2, atol=0.02)
    assert all(len(set(np.round(row, 12))) <= 2 for row in beta)


def test_gradientmix_keys() -> None:
    rule = GradientMix(granularity="parameter", start_step=2, end_step=4)
    first = rule.weights(RngKey(1, 3), 4, 6)
    assert first.shape == (6, 4) and len(np.unique(first[:, 0])) == 6
    np.testing.assert_array_equal(first, rule.weights(RngKey(1, 3), 4, 6))
    assert not np.allclose(first, rule.weights(RngKey(1, 2), 4, 6))
    assert not np.allclose(first, rule.weights(RngKey(2, 3), 4, 6))
    for outside in (0, 1, 4, 9):
        np.testing.assert_array_equal(rule.weights(RngKey(1, outside), 4, 6), 0.25)


LIMITS = {
    "GAF threshold 2": (block("GAF", threshold=2.0), 1e-12),
    "GradientMix alpha 1e8": (block("GradientMix", alpha=1e8), 1e-3),
    "VRGD gamma 1": (block(scaling={"gamma": 1.0}), 1e-12),
    "empty block": ({}, 1e-12),
    "momentum alone": (block(scaling={"gamma": 1.0, "momentum": 0.9}), 1e-12),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_that_equal_the_mean(name: str) -> None:
    rule, tolerance = LIMITS[name]
    grads = gaussian(6, seed=1)
    combined, info = combine(grads, rule, sizes=SIZES)
    assert not info["skipped"]
    np.testing.assert_allclose(combined.numpy(), grads.mean(0).numpy(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_identical_workers_give_their_gradient(name: str, workers: int) -> None:
    if workers < MIN_WORKERS.get(name, 0):
        return
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        grads = gaussian(1, seed=2).to(dtype).expand(workers, N)
        combined, info = combine(grads, RULES[name], sizes=SIZES)
        torch.testing.assert_close(combined, grads[0], rtol=tolerance, atol=0)
        assert not info["skipped"] and combined.dtype == dtype


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("exponent", [-80, -40, 0, 40, 80])
def test_scale_does_not_matter(name: str, exponent: int) -> None:
    """Loss scaling: all gradients times the same positive number, far beyond where squares are float32."""
    grads = gaussian(5, seed=4).float()
    plain, info = combine(grads, RULES[name], sizes=SIZES)
    scaled, scaled_info = combine(grads * 2.0**exponent, RULES[name], sizes=SIZES)
    # Gram matrices of float32 are off by 2e-7, which shows in elements of a longer sum that nearly cancel.
    atol = 1e-6 * float(plain.abs().max()) if name in ANY_SUM else 0.0
    torch.testing.assert_close(scaled * 2.0**-exponent, plain, rtol=1e-6, atol=atol)
    torch.testing.assert_close(scaled_info["weights"], info["weights"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs_stay_finite(rule: str, name: str) -> None:
    grads = NASTY[name]
    if 1 < len(grads) < MIN_WORKERS.get(rule, 0):
        return
    before = grads.clone()
    combined, info = combine(grads, RULES[rule])
    assert combined.shape == grads.shape[1:] and combined.isfinite().all()
    assert torch.equal(grads, before)
    weights = info["weights"].reshape(-1, grads.shape[0])
    assert weights.isfinite().all()
    if rule not in ANY_SUM:
        sums = weights.sum(1).tolist()
        assert (weights >= 0).all() and all(abs(s) < 1e-9 or abs(s - 1) < 1e-9 for s in sums)
    if name == "all zero":
        assert not combined.any()
    if grads.shape[0] == 1:
        assert torch.equal(combined, grads[0])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_nonfinite(name: str, bad: float) -> None:
    grads = gaussian(4, seed=8).float()
    grads[2, 100] = bad
    combined, info = combine(grads, RULES[name], sizes=SIZES)
    assert not combined.isfinite().all() and not info["skipped"]  # whatever the rule: DeepSpeed must see it
    dropped, info = combine(grads, {**RULES[name], "nonfinite": "drop"}, sizes=SIZES)
    assert dropped.isfinite().all() and not info["weights"].reshape(-1, 4)[:, 2].any()
    if name in ("mean", "gaf"):  # what is left is decided as if the worker were not there
        others = [0, 1, 3]
        rest = (
            {**RULES[name], "mixing": {"type": "gaf", "params": {"threshold": 2.0}}} if name == "gaf" else {}
        )
        expected, _ = combine(grads[others], {"mixing": rest.get("mixing", {"type": "Mean"})})
        got, _ = combine(grads, {**rest, "nonfinite": "drop"})
        torch.testing.assert_close(got, expected)
    grads[:] = bad
    nothing, info = combine(grads, {**RULES[name], "nonfinite": "drop"}, sizes=SIZES)
    assert info["skipped"] and not nothing.any()


def test_combine_refuses() -> None:
    for wrong in ([[1.0, 2.0]], "x", None):
        with pytest.raises(ValueError, match="stack the gradients"):
            combine(wrong, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gradmix\.1: unknown key"):
        combine(torch.zeros(2, 3), {1: 2})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="allowed is a floating-point tensor"):
        combine(torch.zeros(3), {})
    with pytest.raises(ValueError, match="allowed is a floating-point tensor"):
        combine(torch.zeros(2, 3, dtype=torch.int64), {})
    with pytest.raises(ValueError, match=r"sizes: \[1, 1\] adds up to 2.*N = 3"):
        combine(torch.zeros(2, 3), {}, sizes=[1, 1])
    with pytest.raises(ValueError, match=r"gradmix\.mixing\.type"):
        combine(torch.zeros(2, 3), {"mixing": {"type": "nope"}})
