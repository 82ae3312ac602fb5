"""LAMB and LARS against float64 formulas of the test's own, and against pytorch-optimizer's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import pytorch_optimizer
import torch

from ds_gradmix.optim import Lamb, Lars, layerwise
from ds_gradmix.optim.layout import GroupLayout, Part
from tests.support.solo import NoSynchronisation, PeakMemory
from tests.support.trust_ratios import ByFormula

SHAPES = [(40, 30), (30,), (7, 5, 3), (), (1, 200), (64, 64), (3,)]
LAMB: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.01},
    "decay": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4},
    "as published": {"lr": 0.02, "weight_decay": 0.1, "exclude_one_dimensional": False},
    "no bias correction": {"lr": 0.01, "weight_decay": 0.1, "bias_correction": False},
    "bounds": {"lr": 0.01, "min_coeff": 0.9, "max_coeff": 1.1, "exclude_one_dimensional": False},
}
LARS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 1.0},
    "decay": {"lr": 1.0, "weight_decay": 0.1, "momentum": 0.8, "trust_coefficient": 0.02},
    "as published": {"lr": 2.0, "weight_decay": 0.1, "exclude_one_dimensional": False},
    "nesterov": {"lr": 1.0, "weight_decay": 0.1, "nesterov": True},
    "no momentum": {"lr": 1.0, "weight_decay": 0.1, "momentum": 0.0},
}
CASES = [(Lamb, name) for name in LAMB] + [(Lars, name) for name in LARS]


def settings(kind: type, name: str) -> dict[str, Any]:
    return (LAMB if kind is Lamb else LARS)[name]


def numbers(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients(step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    return [0.01 * (p + 0.5 * q) for p, q in zip(numbers(shapes, 1), numbers(shapes, 2 + step), strict=True)]


def formula(kind: type, given: dict[str, Any], steps: int) -> list[torch.Tensor]:
    """Parameter by parameter, in float64."""
    params = parameters(torch.float64)
    optimizer = ByFormula(params, {Lamb: "Lamb", Lars: "LARS"}[kind], **given)
    return train(optimizer, params, 0, steps)


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor], first: int, last: int
) -> list[torch.Tensor]:
    for step in range(first, last):
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()
    return [p.detach().double() for p in params]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.to(dtype)) for p in numbers()]


def furthest(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest weight."""
    largest = max(float(w.abs().max()) for w in wanted)
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True)) / largest


@pytest.mark.parametrize("tile", [64, 1 << 16])
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_equals_the_formula(kind: type, name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_CPU_TILE", tile)
    wanted = formula(kind, settings(kind, name), 12)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        params = parameters(dtype)
        assert furthest(train(kind(params, **settings(kind, name)), params, 0, 12), wanted) < tolerance
    assert furthest(numbers(), wanted) > 0.005, "it does something"


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (
            lambda p: Lamb(p, 0.01, weight_decay=0.1, bias_correction=False, exclude_one_dimensional=False),
            lambda p: pytorch_optimizer.Lamb(
                p, 0.01, weight_decay=0.1, weight_decouple=False, adam_debias=True, foreach=False
            ),
        ),
        (
            lambda p: Lars(p, 1.0, weight_decay=0.1),
            lambda p: pytorch_optimizer.LARS(p, 1.0, weight_decay=0.1, foreach=False),
        ),
        (
            lambda p: Lars(p, 1.0, weight_decay=0.1, nesterov=True),
            lambda p: pytorch_optimizer.LARS(p, 1.0, weight_decay=0.1, nesterov=True, foreach=False),
        ),
    ],
    ids=["LAMB", "LARS", "LARS nesterov"],
)
def test_equals_pytorch_optimizer(ours: Any, theirs: Any) -> None:
    """Its LAMB has no bias correction in the update, adds eps to the norm as well, and bounds norms."""
    params, reference = parameters(), parameters()
    optimizer = theirs(reference)
    optimizer.clamp = math.inf
    wanted = train(optimizer, reference, 0, 12)
    assert furthest(train(ours(params), params, 0, 12), wanted) < 1e-6


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_partitions_of_a_flat_tensor_equal_whole_parameters(
    kind: type, name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks' partitions, with padding between parameters, and the sums added between them."""
    monkeypatch.setattr(layerwise, "_CPU_TILE", tile)
    flats, spans, size = flat_partitions()
    optimizers = []
    for rank, flat in enumerate(flats):
        optimizer = kind(parameters(), **settings(kind, name))
        optimizer.param_groups[0]["params"] = [flat]
        parts = [Part(0, max(at - rank * size, 0), n, i) for i, at, n in cut(spans, rank * size, size)]
        counted = [True] * len(SHAPES)
        layout = GroupLayout(parts, [len(shape) <= 1 for shape in SHAPES], counted, spends_gradients=True)
        optimizers.append((optimizer, layout))
    for step in range(12):
        take_steps(optimizers, flats, spans, size, step)
    found = torch.cat([flat.detach().double() for flat in flats])
    params = [found[at : at + n].view(shape) for shape, (at, n) in zip(SHAPES, spans, strict=True)]
    assert furthest(params, formula(kind, settings(kind, name), 12)) < 1e-6
    padding = torch.ones(len(found), dtype=torch.bool)
    for at, n in spans:
        padding[at : at + n] = False
    assert padding.any() and not found[padding].any()


def flat_partitions() -> tuple[list[torch.nn.Parameter], list[tuple[int, int]], int]:
    spans, at = [], 0
    for shape in SHAPES:
        spans.append((at, math.prod(shape)))
        at += math.prod(shape) + 3
    size = at // 2 + 4
    whole = torch.zeros(2 * size)
    for p, (start, n) in zip(numbers(), spans, strict=True):
        whole[start : start + n] = p.reshape(-1)
    return [torch.nn.Parameter(part.clone()) for part in whole.split(size)], spans, size


def cut(spans: Sequence[tuple[int, int]], begin: int, size: int) -> list[tuple[int, int, int]]:
    found = []
    for i, (at, n) in enumerate(spans):
        low, high = max(at, begin), min(at + n, begin + size)
        if low < high:
            found.append((i, low, high - low))
    return found


def take_steps(optimizers: Any, flats: Any, spans: Any, size: int, step: int) -> None:
    """Of both ranks: the first time to see what they add to the sums, the second with the sum of both."""
    whole = torch.zeros(2 * size)
    for grad, (at, n) in zip(gradients(step), spans, strict=True):
        whole[at : at + n] = grad.reshape(-1)

    def give_gradients() -> None:
        for flat, part in zip(flats, whole.split(size), strict=True):
            flat.grad = part.clone()

    give_gradients()
    given: list[torch.Tensor] = []
    before = [flat.detach().clone() for flat in flats]
    for (optimizer, layout), flat in zip(optimizers, flats, strict=True):
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.use_layouts([(flat, replace(layout, all_reduce=lambda sums: given.append(sums.clone())))])
        optimizer.step()
        optimizer.load_state_dict(saved)
    give_gradients()
    for (optimizer, layout), flat, old in zip(optimizers, flats, before, strict=True):
        flat.data.copy_(old)
        optimizer.use_layouts(
            [(flat, replace(layout, all_reduce=lambda sums: sums.copy_(given[0] + given[1])))]
        )
        optimizer.step()


@pytest.mark.parametrize("kind", [Lamb, Lars])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_for_bit(kind: type, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    wanted = train(kind(params, lr=0.1, weight_decay=0.1), params, 0, 8)
    params = parameters(dtype)
    optimizer = kind(params, lr=0.1, weight_decay=0.1)
    train(optimizer, params, 0, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = kind(params, lr=0.5)
    resumed.load_state_dict(torch.load(file))
    assert all(map(torch.equal, train(copy.deepcopy(resumed), params, 4, 4), train(resumed, params, 4, 4)))
    assert all(map(torch.equal, train(resumed, params, 4, 8), wanted))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_parameters_without_a_gradient_or_contiguous_memory(kind: type) -> None:
    params = parameters()
    params[0] = torch.nn.Parameter(numbers()[0].float().t().contiguous().t())
    assert not params[0].is_contiguous()
    wanted = formula(kind, {"lr": 0.1}, 3)
    optimizer = kind(params, lr=0.1)
    for step in range(3):
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.float()
        params[2].grad = None
        optimizer.step()
    assert torch.equal(params[2], numbers()[2].float())
    found, wanted = ([p for i, p in enumerate(ps) if i != 2] for ps in (params, wanted))
    assert furthest([p.detach().double() for p in found], wanted) < 1e-6


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_zero_weights_and_zero_gradients(kind: type) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = kind([p], lr=0.5)
    optimizer.step()
    assert torch.allclose(p, torch.full((4, 4), -0.5)), "the ratio of weights that are zero is 1"
    p.grad = torch.zeros(4, 4)
    kind([p], lr=0.5).step()
    assert torch.allclose(p, torch.full((4, 4), -0.5)), "no gradient, no step, and nothing that is not finite"


def test_groups_have_settings_of_their_own() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = Lars([{"params": [first]}, {"params": [second], "lr": 0.0}], lr=0.1)
    for p in (first, second):
        p.grad = torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(first, torch.ones(3, 3)) and torch.equal(second, torch.ones(3, 3))


@pytest.mark.parametrize(
    "kind, given, said",
    [
        (Lamb, {"lr": -1}, "lr: -1, but allowed is a number of at least 0"),
        (Lamb, {"lr": "0.1"}, "lr: '0.1', but allowed"),
        (Lamb, {"weight_decay": math.nan}, "weight_decay: nan"),
        (Lamb, {"betas": 0.9}, "betas: 0.9, but allowed are two numbers"),
        (Lamb, {"betas": (0.9, 1.0)}, "betas: 1.0, but allowed is a number of at least 0 and below 1"),
        (Lamb, {"min_coeff": 2, "max_coeff": 1}, "min_coeff: 2 is more than max_coeff 1"),
        (Lamb, {"bias_correction": 1}, "bias_correction: 1, but allowed is true or false"),
        (Lars, {"momentum": 1}, "momentum: 1, but allowed is a number of at least 0 and below 1"),
        (Lars, {"trust_coefficient": True}, "trust_coefficient: True"),
        (Lars, {"momentum": 0.0, "nesterov": True}, "nesterov: True needs a momentum"),
    ],
)
def test_mistakes(kind: type, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        kind(parameters(), **given)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_tensors_that_nobody_knows_are_refused(kind: type) -> None:
    optimizer = kind(parameters(), lr=0.1)
    flat = torch.nn.Parameter(torch.ones(10))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(10)
    with pytest.raises(RuntimeError, match="--module ds_gradmix"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(10))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_the_host_does_not_wait(kind: type) -> None:
    params = parameters()
    optimizer = kind(params, lr=0.1, weight_decay=0.1)
    with NoSynchronisation():
        train(optimizer, params, 0, 2)


@pytest.mark.parametrize("lengths", [[3_000_000], [100] * 30_000, [700, 50_000, 3] * 60])
@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_memory_beyond_the_state_is_a_few_tiles(kind: type, lengths: list[int]) -> None:
    """And some numbers for each parameter."""
    flat = torch.nn.Parameter(torch.randn(sum(lengths)))
    optimizer = kind([flat], lr=0.1, weight_decay=0.1)
    starts = (
        [sum(lengths[:i]) for i in range(len(lengths))]
        if len(lengths) < 1000
        else range(0, flat.numel(), 100)
    )
    parts = [Part(0, start, n, i) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    optimizer.use_layouts([(flat, GroupLayout(parts, [False] * len(parts), [True] * len(parts)))])
    flat.grad = torch.randn_like(flat)
    optimizer.step()  # makes the state
    with PeakMemory() as watch:
        optimizer.step()
    tile_bytes = 4 * layerwise._CPU_TILE
    assert tile_bytes / 2 < watch.peak_bytes < 5 * tile_bytes + 200 * len(parts), (
        watch.peak_bytes / tile_bytes
    )
