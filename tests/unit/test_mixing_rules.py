"""Adasum, AdaCons, Krum, MultiKrum, the geometric median and TorchJD's weightings against references that
work on the gradients themselves.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchjd.aggregation
from torch import Tensor

from ds_gradmix import combine
from ds_gradmix.cli import main
from ds_gradmix.config import ConfigError, check_workers, parse_block
from ds_gradmix.exchange.step_stats import StepStats
from ds_gradmix.log import logger
from ds_gradmix.rules import (
    AdaCons,
    Adasum,
    GeometricMedian,
    Krum,
    MixingDecision,
    MultiKrum,
    RngKey,
    TorchJD,
)
from ds_gradmix.rules.apply import decide_from_gram
from tests.support.gradients import NASTY, SIZES, block, gaussian, rows
from tests.support.reference import Array, vrgd
from tests.support.reference_mixing import (
    adacons,
    adasum,
    geometric_median,
    krum_order,
    sum_of_distances,
)
from tests.support.solo import Launches, NoSynchronisation

KEY = RngKey(1, 2)
WORKERS = [2, 3, 4, 5, 6, 7, 8, 13]


def near(combined: Tensor, expected: Array, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(combined.numpy(), expected, rtol=tolerance, atol=tolerance)


def with_outliers(workers: int, outliers: int, seed: int, columns: int = 300) -> Tensor:
    grads = gaussian(workers, columns, seed=seed)
    grads[:outliers] *= -100.0
    return grads


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shared", [0.0, 0.3, 3.0])
def test_adasum(workers: int, shared: float) -> None:
    for seed in range(3):
        grads = gaussian(workers, seed=seed, shared=shared)
        grads[seed % workers] *= 50.0
        near(combine(grads, block("Adasum"))[0], adasum(rows(grads)))
        by_param, info = combine(grads, block("Adasum", scope="parameter"), sizes=SIZES)
        parts = [adasum(rows(part)) for part in grads.split(SIZES, dim=1)]
        near(by_param, np.concatenate(parts))
        assert info["weights"].shape == (len(SIZES), workers)


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_parallel() -> None:
    for workers in (2, 3, 8, 11):
        eye = torch.eye(workers, dtype=torch.float64)
        assert combine(eye, block("Adasum"))[1]["weights"].tolist() == [1.0] * workers
        same = eye[:1].expand(workers, -1)
        assert combine(same, block("Adasum"))[0].tolist() == eye[0].tolist()


def test_adasum_leaves_others_as_they_are_beside_a_zero_gradient_or_an_absent_worker() -> None:
    grads = gaussian(7, seed=1)
    for zero in range(7):
        present = [i for i in range(7) if i != zero]
        some = grads.clone()
        some[zero] = 0.0
        near(combine(some, block("Adasum"))[0], adasum(rows(some)))
        some[zero] = float("nan")
        combined, info = combine(some, block("Adasum", nonfinite="drop"))
        near(combined, adasum(rows(grads[present])))
        assert info["weights"][zero] == 0.0


def test_adasum_of_workers_that_cancel_does_not_depend_on_rounding() -> None:
    """The node of two opposed workers is zero, and must not be divided by what rounding leaves of it."""
    for seed in range(20):
        first, second, third, noise = gaussian(4, seed=seed).float()
        grads = torch.stack([first, 1e-6 * noise - first, second, third])
        expected = adasum([np.zeros(len(first)), adasum(rows(torch.stack([second, third])))])
        combined, info = combine(grads, block("Adasum"))
        near(combined.double(), expected, 1e-5)
        assert info["weights"].abs().max() < 2.0


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_adacons(workers: int, momentum: float) -> None:
    steps = [gaussian(workers, seed=seed, shared=0.5) * 2.0 ** (seed % 3) for seed in range(6)]
    for at, grads in enumerate(steps):
        grads[at % workers] *= 7.0
    rule = AdaCons(momentum=momentum)
    state, present = rule.initial_state(workers), torch.ones(workers, dtype=torch.bool)
    expected = adacons([rows(grads) for grads in steps], momentum)
    directions = []
    for grads, combined in zip(steps, expected, strict=True):
        decision, state_SKW = rule.decide_with_state((grads @ grads.t())[None], present, KEY, state)
        state = state_SKW[0]
        near(decision.weights_SW[0] @ grads, combined)
        directions.append(decision.weights_SW[0] @ grads)
    kept = None
    for step, (grads, wanted) in enumerate(zip(steps, expected, strict=True)):
        combined, info = combine(grads, block("AdaCons", momentum=momentum), step, state=kept)
        kept = info["state"]
        near(combined, wanted)
    assert kept is not None and kept.steps == len(steps)
    published = adacons([rows(grads) for grads in steps], 0.0, restored=False)
    if momentum == 0.0:
        for mixed, wanted in zip(directions, published, strict=True):
            cosine = float(mixed.numpy() @ wanted) / float(np.linalg.norm(mixed) * np.linalg.norm(wanted))
            assert cosine == pytest.approx(1.0, abs=1e-12)


def test_a_step_without_anybody_leaves_the_state() -> None:
    grads = gaussian(3, seed=1)
    settings = {**block("AdaCons"), "nonfinite": "drop"}
    kept = combine(grads, settings)[1]["state"]
    _, info = combine(torch.full_like(grads, math.nan), settings, 1, state=kept)
    assert info["skipped"] and info["state"] is kept and kept.mixing_KW.abs().sum() > 0


def test_adacons_as_published_with_gradients_of_mean_length_1() -> None:
    """What is ours, the length, changes nothing then, with momentum neither."""
    steps = []
    for seed in range(5):
        grads = gaussian(4, seed=seed, shared=0.5)
        steps.append(grads / torch.linalg.vector_norm(grads, dim=1).mean())
    lists = [rows(grads) for grads in steps]
    for ours, published in zip(adacons(lists, 0.9), adacons(lists, 0.9, restored=False), strict=True):
        np.testing.assert_allclose(ours, published, rtol=1e-12)


def test_adacons_goes_without_its_average_where_a_worker_is_absent() -> None:
    grads = gaussian(5, seed=3, shared=0.5)
    rule, present = AdaCons(), torch.ones(5, dtype=torch.bool)
    _, (state,) = rule.decide_with_state((grads @ grads.t())[None], present, KEY, rule.initial_state(5))
    present[1] = False
    other = gaussian(5, seed=4, shared=0.5)
    decision, (same,) = rule.decide_with_state((other @ other.t())[None], present, KEY, state)
    assert torch.equal(same, state) and decision.weights_SW[0, 1] == 0
    (expected,) = adacons([rows(other[present])], 0.9)
    near(decision.weights_SW[0] @ other, expected)


def test_adacons_averages_states_over_decisions() -> None:
    """Of a decision that left the first state as it was, nothing is in the mean of two."""
    grads, rule = gaussian(3, seed=3, shared=0.5), AdaCons()
    gram, present = (grads @ grads.t())[None], torch.ones(3, dtype=torch.bool)
    _, (state,) = rule.decide_with_state(gram, present, KEY, rule.initial_state(3))
    other = gaussian(3, seed=5, shared=0.5)
    gram = (other @ other.t())[None]
    expected = rule.decide_with_state(gram, present, KEY, state)
    found = rule.decide_with_state(gram, present, KEY, (state + rule.initial_state(3)) / 2)
    torch.testing.assert_close(found[0].weights_SW, expected[0].weights_SW)
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("workers", [3, 4, 5, 8, 13])
def test_krum_and_multikrum(workers: int) -> None:
    for num_byzantine in range(workers - 2):
        for seed in range(4):
            grads = with_outliers(workers, min(num_byzantine, workers // 3), seed)
            order = krum_order(rows(grads), num_byzantine)
            _, info = combine(grads, block("Krum", num_byzantine=num_byzantine))
            assert info["weights"].tolist() == np.eye(workers)[order[0]].tolist()
            for selected in (1, 2, workers - num_byzantine - 2, workers):
                params = {"num_byzantine": num_byzantine, "num_selected": selected}
                _, info = combine(grads, {"mixing": {"type": "MultiKrum", "params": params}})
                assert np.flatnonzero(info["weights"].numpy()).tolist() == sorted(order[:selected])
                assert set(info["weights"].tolist()) <= {0.0, 1 / selected}
    usual = combine(grads, block("MultiKrum", num_byzantine=0))[1]["weights"]
    assert int((usual > 0).sum()) == workers - 2


def test_krum_takes_the_first_of_equal_workers() -> None:
    """Equal up to the rounding of Gram matrices, so that the cut into tiles does not choose."""
    for seed in range(5):
        same = gaussian(1, seed=1) * (1 + 1e-5 * gaussian(5, 1, seed=seed))
        assert combine(same, block("Krum"))[1]["weights"].tolist() == [1.0, 0, 0, 0, 0]
        params = {"num_byzantine": 1, "num_selected": 2}
        weights = combine(same, {"mixing": {"type": "MultiKrum", "params": params}})[1]["weights"]
        assert weights.tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_krum_without_absent_workers(bad: int) -> None:
    grads = with_outliers(7, 1, seed=5)
    rest = [i for i in range(7) if i != bad]
    expected = combine(grads[rest], block("Krum"))[0]
    grads[bad] = float("inf")
    assert torch.equal(combine(grads, block("Krum", nonfinite="drop"))[0], expected)


TOO_FEW: list[tuple[str, dict[str, Any], int, str]] = [
    ("Krum", {"num_byzantine": 2}, 4, "num_byzantine: is 2; allowed: an integer, >= 0, <= 1 with 4 workers"),
    ("Krum", {}, 2, "num_byzantine: is 1; allowed: none with 2 workers; lower it, or use 4 workers or more"),
    ("MultiKrum", {"num_byzantine": 9}, 11, "num_byzantine: is 9; allowed: an integer, >= 0, <= 8"),
    ("MultiKrum", {"num_selected": 9}, 8, "num_selected: is 9; allowed: an integer, >= 1, <= 8"),
    (
        "TorchJD",
        {"weighting": "UPGradWeighting", "pref_vector": [1.0, 2.0]},
        3,
        "pref_vector: is [1.0, 2.0]; allowed: a list of 3 numbers, one for each worker",
    ),
    (
        "TorchJD",
        {"weighting": "KrumWeighting", "n_byzantine": 3},
        5,
        'weighting: is "KrumWeighting"; allowed: one that takes 5 workers; ValueError: ',
    ),
]


@pytest.mark.parametrize("rule, params, workers, line", TOO_FEW, ids=lambda value: str(value)[:20])
def test_a_number_of_workers_that_does_not_fit(
    rule: str, params: dict[str, Any], workers: int, line: str, tmp_path: Path, capsys: Any
) -> None:
    config = {"mixing": {"type": rule, "params": params}}
    for grads in (gaussian(workers, 9), gaussian(workers, 9).float()):
        with pytest.raises(ConfigError) as caught:
            combine(grads, config)
        assert str(caught.value).startswith(f"gradmix.mixing.params.{line}")
    check_workers(parse_block(config), 1)  # one worker needs no rule
    (tmp_path / "ds.json").write_text(json.dumps({"gradmix": config}))
    assert main(["check", str(tmp_path / "ds.json"), "--dp", str(workers)]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "workers, outliers, columns", [(3, 0, 300), (4, 1, 9), (8, 0, 2), (9, 4, 300), (40, 15, 3)]
)
def test_geometric_median(workers: int, outliers: int, columns: int) -> None:
    for seed in range(3):
        grads = with_outliers(workers, outliers, seed, columns)
        combined, info = combine(grads, block("GeometricMedian"))
        assert float(info["weights"].sum()) == pytest.approx(1.0)
        found = sum_of_distances(rows(grads), combined.numpy())
        median = geometric_median(rows(grads))
        least = sum_of_distances(rows(grads), median)
        assert least * (1 - 1e-12) <= found <= least * (1 + 1e-4)
        if columns == 300:  # gradients have many more elements than there are workers
            length = np.linalg.norm(rows(grads) - median, axis=1).mean()
            assert np.linalg.norm(combined.numpy() - median) <= 1e-4 * length
        random = np.random.default_rng(seed)
        for step in (1e-1, 1.0):
            aside = random.standard_normal(columns) * step * least / workers / math.sqrt(columns)
            assert found <= sum_of_distances(rows(grads), combined.numpy() + aside)


def test_geometric_median_of_equal_workers_does_not_depend_on_rounding() -> None:
    for seed in range(5):
        same = gaussian(1, seed=1) + 1e-7 * gaussian(5, seed=seed) * torch.arange(1, 6)[:, None]
        weights = combine(same.float(), block("GeometricMedian"))[1]["weights"]
        np.testing.assert_allclose(weights.numpy(), 0.2, rtol=1e-6)


def test_geometric_median_holds_against_nearly_half() -> None:
    honest = gaussian(9, 300, seed=2, shared=1.0)
    for factor in (1.0, 1e3, 1e6):
        grads = honest.clone()
        grads[:4] = factor * gaussian(4, 300, seed=3, shared=0.0)
        combined, _ = combine(grads, block("GeometricMedian"))
        assert float(torch.dist(combined, honest[4:].mean(0))) < 1.2 * float(honest.norm(dim=1).mean())


def of_torchjd(weighting: str, **params: Any) -> dict[str, Any]:
    return {"mixing": {"type": "TorchJD", "params": {"weighting": weighting, **params}}}


AGGREGATORS: dict[str, tuple[torchjd.aggregation.Aggregator, dict[str, Any]]] = {
    "UPGrad": (torchjd.aggregation.UPGrad(), of_torchjd("UPGradWeighting")),
    "UPGrad with a preference": (
        torchjd.aggregation.UPGrad(pref_vector=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]).double()),
        of_torchjd("upgradweighting", pref_vector=[0.1, 0.2, 0.3, 0.4, 0]),
    ),
    "DualProj": (torchjd.aggregation.DualProj(), of_torchjd("DualProjWeighting")),
    "MGDA": (torchjd.aggregation.MGDA(), of_torchjd("MGDAWeighting")),
    "MGDA of few steps": (torchjd.aggregation.MGDA(max_iters=3), of_torchjd("MGDAWeighting", max_iters=3)),
    "IMTLG": (torchjd.aggregation.IMTLG(), of_torchjd("IMTLGWeighting")),
    "AlignedMTL": (
        torchjd.aggregation.AlignedMTL(scale_mode="median"),
        of_torchjd("AlignedMTLWeighting", scale_mode="median"),
    ),
    "Krum": (torchjd.aggregation.Krum(1, 2), of_torchjd("KrumWeighting", n_byzantine=1, n_selected=2)),
    "FairGrad": (torchjd.aggregation.FairGrad(alpha=2.0), of_torchjd("FairGradWeighting", alpha=2)),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_torchjd_combines_as_its_aggregators_do(name: str) -> None:
    aggregator, config = AGGREGATORS[name]
    for seed in range(4):
        grads = gaussian(5, 30, seed=seed, shared=-0.2)
        # FairGrad's weights depend on the gradients' scale in TorchJD, here on no scale: let it be 1.
        scale = float(grads.square().sum(1).mean().sqrt())
        combined, _ = combine(grads, config)
        torch.testing.assert_close(combined, aggregator(grads / scale) * scale, rtol=1e-6, atol=1e-9)


def test_torchjd_by_parameter_and_without_absent_workers() -> None:
    grads = gaussian(4, seed=3, shared=-0.2)
    aggregator, config = torchjd.aggregation.UPGrad(), of_torchjd("UPGradWeighting")
    by_param, _ = combine(grads, {**config, "scope": "parameter"}, sizes=SIZES)
    expected = [aggregator(part) if part.shape[1] else part[0] for part in grads.split(SIZES, dim=1)]
    # The program's matrix has a condition of up to 1e4.
    torch.testing.assert_close(by_param, torch.cat(expected), rtol=1e-5, atol=1e-8)
    config = of_torchjd("UPGradWeighting", pref_vector=[0.4, 0.3, 0.2, 0.1])
    others = torchjd.aggregation.UPGrad(pref_vector=torch.tensor([0.4, 0.3, 0.1]).double())
    expected_N = others(grads[[0, 1, 3]])
    grads[2, 5] = float("nan")
    dropped, info = combine(grads, {**config, "nonfinite": "drop"})
    torch.testing.assert_close(dropped, expected_N, rtol=1e-5, atol=1e-8)
    assert info["weights"][2] == 0


def test_torchjd_draws_by_seed_and_step_and_leaves_others_draws_alone() -> None:
    grads, config = gaussian(6, 4, seed=1, shared=0.0), of_torchjd("PCGradWeighting")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = [combine(grads, config, step=step)[1]["weights"].tolist() for step in (0, 0, 1, 2, 3)]
    assert torch.equal(torch.rand(3), wanted)
    assert found[0] == found[1] and len(set(map(tuple, found))) > 1


def test_torchjd_where_it_fails_takes_the_mean_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Two of five are left, and torchjd's Krum wants four of them."""
    grads = gaussian(5, 9, seed=1)
    grads[:3, 2] = float("nan")
    config = {**of_torchjd("KrumWeighting", n_byzantine=1), "nonfinite": "drop"}
    logger.addHandler(caplog.handler)
    try:
        assert combine(grads, config)[1]["weights"].tolist() == [0, 0, 0, 0.5, 0.5]
    finally:
        logger.removeHandler(caplog.handler)
    assert "TorchJD's KrumWeighting failed with ValueError" in caplog.text


TORCHJD_MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["weighting: is missing", '"MGDAWeighting" or ']),
    ({"weighting": "upgrad"}, ['weighting: is "upgrad"', 'did you mean "UPGradWeighting"?']),
    ({"weighting": ["x"]}, ["weighting: is ['x']", "name one of these"]),
    ({"weighting": "PCDWeighting", "tau": 1}, ['weighting: is "PCDWeighting"', "keeps a state over steps"]),
    ({"weighting": "MeanWeighting"}, ['weighting: is "MeanWeighting"']),  # it takes no Gram matrix
    ({"weighting": "KrumWeighting"}, ["n_byzantine: is missing", "integer", "add it"]),
    (
        {"weighting": "KrumWeighting", "n_byzantine": -1},
        ["n_byzantine: is -1", "n_byzantine must be non-negative"],
    ),
    ({"weighting": "KrumWeighting", "n_byzantine": 1.0}, ["n_byzantine: is 1.0", "allowed: integer"]),
    (
        {"weighting": "UPGradWeighting", "pref": [1]},
        ["pref: unknown key", "weighting, pref_vector", 'did you mean "pref_vector"?'],
    ),
    (
        {"weighting": "UPGradWeighting", "pref_vector": "x"},
        ['pref_vector: is "x"', "list of number or null (default null)"],
    ),
    ({"weighting": "UPGradWeighting", "pref_vector": [1, float("nan")]}, ["pref_vector: is [1, nan]"]),
    (
        {"weighting": "AlignedMTLWeighting", "scale_mode": "mim"},
        ['"min" or "median" or "rmse"', 'did you mean "min"?'],
    ),
]


@pytest.mark.parametrize("params, words", TORCHJD_MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_in_torchjds_params(params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"mixing": {"type": "TorchJD", "params": params}})
    assert str(caught.value).startswith("gradmix.mixing.params.") and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_weighting_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchjd.aggregation.FairGradWeighting
    monkeypatch.setattr(kind, "_REQUIRED_DEPS", ["numpy", "no_such_package"])
    with pytest.raises(
        ConfigError, match="FairGradWeighting needs no_such_package: pip install no_such_package"
    ):
        parse_block(of_torchjd("FairGradWeighting", alpha=1.0))


def test_torchjd_is_imported_by_its_rule_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, the others do not miss it."""
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    parse_block(block("Adasum"))
    assert TorchJD.examples() == ()
    with pytest.raises(ConfigError) as caught:
        parse_block(of_torchjd("UPGradWeighting"))
    assert str(caught.value).startswith('gradmix.mixing.params.weighting: is "UPGradWeighting"; allowed: ')
    assert "pip install ds_gradmix[torchjd]" in str(caught.value)


def test_a_torchjd_rule_says_what_it_is() -> None:
    rule = TorchJD(weighting="UPGradWeighting", pref_vector=[1.0, 2.0])
    assert repr(rule) == "TorchJD(weighting='UPGradWeighting', pref_vector=[1.0, 2.0])"
    assert parse_block(of_torchjd("UPGradWeighting", pref_vector=[1, 2])).mixing == rule
    with pytest.raises(ValueError, match="weighting: allowed: "):
        TorchJD(weighting="nope")


EVERY = [Adasum(), AdaCons(), Krum(), MultiKrum(), GeometricMedian(), *TorchJD.examples()]


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_gram_matrices_that_are_not_finite_become_nan(rule: Any) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        gram = torch.stack([torch.eye(4, dtype=torch.float64)] * 2)
        gram[0, 1, 2] = bad
        considered = decide_from_gram(rule, gram, torch.ones(4, dtype=torch.bool), KEY, rule.initial_state(4))
        weights = considered.decision.weights_SW
        assert weights[0].isnan().all() and weights[1].isfinite().all()
        assert torch.equal(considered.next_state_SKW[0], rule.initial_state(4))


class Kernels(Launches):
    VIEWS = (
        *Launches.VIEWS,
        "_unsafe_view",
        "scalar_tensor",
        "split",
        "empty_like",
    )  # a number is an argument


@pytest.mark.parametrize("rule", EVERY[:5], ids=repr)
@pytest.mark.parametrize("workers", [5, 8, 100])
def test_launches_are_no_more_than_the_costs_say(rule: Any, workers: int) -> None:
    gram = gaussian(workers, seed=1) @ gaussian(workers, seed=1).t()
    present, state = torch.ones(workers, dtype=torch.bool), rule.initial_state(workers)
    with Launches() as launches:
        rule.decide_with_state(gram[None], present, KEY, state)
    assert 0.8 * rule.cost(workers).launches <= launches.count <= rule.cost(workers).launches


@pytest.mark.parametrize("rule", EVERY[:5], ids=repr)
def test_the_host_waits_for_nothing(rule: Any) -> None:
    gram, present = torch.eye(6, dtype=torch.float64).expand(3, 6, 6), torch.ones(6, dtype=torch.bool)
    with NoSynchronisation():
        rule.decide_with_state(gram, present, KEY, rule.initial_state(6))


def test_vrgd_under_weights_that_do_not_sum_to_1() -> None:
    """Its factors are those of weights that do, since a factor is a ratio of gradients' squares."""
    for name in ("Adasum", "AdaCons", "GeometricMedian"):
        for scope in ("bucket", "parameter"):
            grads = gaussian(8, seed=1)
            plain = block(name, scope=scope)
            combined, info = combine(grads, plain, sizes=SIZES)
            scaled, scaled_info = combine(grads, plain | block(scaling={"gamma": 0.1}), sizes=SIZES)
            parts, found = grads.split(SIZES, dim=1), scaled_info["factors"].split(SIZES)
            weights = info["weights"].expand(len(SIZES), 8)
            for part, weights_W, factors in zip(parts, weights.numpy(), found, strict=True):
                _, expected = vrgd(rows(part), weights_W / weights_W.sum(), [part.shape[1]], 0.1)
                np.testing.assert_allclose(factors.numpy(), expected, rtol=1e-9)
            near(scaled, (scaled_info["factors"] * combined).numpy())


def test_effective_workers_are_counted_whatever_weights_sum_to() -> None:
    stats, everyone = StepStats(torch.device("cpu")), torch.ones(4, dtype=torch.bool)
    for weights in ([0.25] * 4, [1.0] * 4, [0.5, 0.5, 0.0, 0.0], [0.0] * 4):
        row = torch.tensor([weights], dtype=torch.float64)
        stats.add_decision(MixingDecision(row, row.any(1), torch.zeros(1).double()), 1.0, everyone)
    assert float(stats._sums[2]) == 4 + 4 + 2 + 0


def test_weights_that_do_not_sum_to_1() -> None:
    sums = {
        name: float(combine(gaussian(8, seed=1, shared=0.0), block(name))[1]["weights"].sum())
        for name in ("Adasum", "AdaCons", "GeometricMedian", "MultiKrum")
    }
    assert sums["Adasum"] > 7.0  # nearly orthogonal
    assert 0.9 < sums["AdaCons"] < 1.1 and sums["AdaCons"] != 1.0
    assert sums["GeometricMedian"] == pytest.approx(1.0) and sums["MultiKrum"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", NASTY)
def test_torchjd_with_nasty_inputs(name: str) -> None:
    for weighting in (
        "UPGradWeighting",
        "DualProjWeighting",
        "MGDAWeighting",
        "IMTLGWeighting",
        "PCGradWeighting",
    ):
        combined, _ = combine(NASTY[name][:8], of_torchjd(weighting))
        assert combined.isfinite().all()
