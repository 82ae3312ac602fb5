"""Rules from outside train under DeepSpeed as a float64 replay says, and go on after a checkpoint as if there
had been none: a mixing rule with state, a scaling rule with two statistics and three sums, AndMask. So do
AdaCons, which has state, and Adasum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.outside_rules import MODULE
from tests.support.ranks import run_ranks
from tests.support.reference import Array, and_mask, spread, trust
from tests.support.reference_mixing import adacons_step, adasum

WORLD, STEPS, LR, RESUMED_AT = 4, 6, 0.05, 3
DECAY, SKIP_BELOW = 0.6, -0.2
OPPOSED_AT = 2  # the step at which the first worker's targets make it point elsewhere


@dataclass(frozen=True)
class Own:
    """One training run with rules from outside, or with a mixing rule of ours."""

    stage: int
    scaling: str | None = None
    scope: str = "bucket"
    skips: bool = False
    accumulation: int = 1
    mixing: str = "Trust"

    @property
    def block(self) -> dict[str, Any]:
        if self.mixing != "Trust":
            params = {"momentum": DECAY} if self.mixing == "AdaCons" else {}
            return {"mixing": {"type": self.mixing, "params": params}}
        params = {"decay": DECAY, **({"skip_below": SKIP_BELOW} if self.skips else {})}
        block = {"mixing": {"type": f"{MODULE}:Trust", "params": params}, "scope": self.scope}
        return block | ({"scaling": {"type": self.scaling}} if self.scaling else {})

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**6,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage},
            "gradmix": self.block,
        }


CASES = {
    "ZeRO-0": Own(0, f"{MODULE}:Spread"),
    "ZeRO-1": Own(1, f"{MODULE}:Spread", skips=True),
    "ZeRO-2": Own(2, f"{MODULE}:Spread", accumulation=2),
    "ZeRO-2 skips": Own(2, skips=True),
    "ZeRO-0 by parameter": Own(0, "AndMask", scope="parameter"),
    "ZeRO-2 by parameter": Own(2, "AndMask", scope="parameter"),
    "ZeRO-1 for the model": Own(1, scope="model", skips=True),
    "AdaCons": Own(2, accumulation=2, mixing="AdaCons"),
    "Adasum": Own(1, mixing="Adasum"),
}


def new_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    inputs = torch.randn(8, 5, generator=random)
    targets = 3 + inputs[:, :3].sin() + torch.randn(8, 3, generator=random)
    return inputs, -targets if (step, rank) == (OPPOSED_AT, 0) else targets


def build(case: Own, **params: Any) -> Any:
    import deepspeed

    config = case.config
    config["gradmix"]["mixing"]["params"] |= params
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, case: Own, steps: Sequence[int]) -> Iterator[tuple[list[Any], list[Any], int]]:
    """After every step: weights, the state of the mixing rule, and how many steps were skipped."""
    from ds_gradmix.engines.install import reducer_of

    rank = torch.distributed.get_rank()
    for step in steps:
        for micro in range(case.accumulation):
            inputs, targets = batch(step, micro, rank)
            engine.backward((engine(inputs) - targets).square().mean())
            engine.step()
        weights = [p.detach().double().numpy().copy() for p in engine.module.parameters()]
        reducer = reducer_of(engine)
        assert reducer is not None
        (state,) = reducer.state.mixing
        yield weights, state.values_KW.tolist(), engine.skipped_steps


def train_everything(folder: str) -> dict[str, Any]:
    """On a rank: every case without a stop, and what the same is after a checkpoint."""
    import ds_gradmix

    ds_gradmix.enable()
    out: dict[str, Any] = {}
    for name, case in CASES.items():
        engine = build(case)
        out[name] = list(train(engine, case, range(RESUMED_AT)))
        engine.save_checkpoint(str(Path(folder) / name.replace(" ", "_")))
        out[name] += list(train(engine, case, range(RESUMED_AT, STEPS)))
        engine.destroy()
        engine = build(case)
        engine.load_checkpoint(str(Path(folder) / name.replace(" ", "_")))
        out[f"{name}, resumed"] = list(train(engine, case, range(RESUMED_AT, STEPS)))
        engine.destroy()
    with pytest.raises(ds_gradmix.ConfigError) as caught:
        build(Own(1, mixing="Krum"), num_byzantine=2)
    return {**out, "refused": str(caught.value)}


@cache
def results() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        return run_ranks(WORLD, train_everything, folder)


def gradients(model: torch.nn.Module, case: Own, step: int, micros: Sequence[int]) -> list[list[Array]]:
    """Of each worker each parameter's gradient in float64."""
    found = []
    for rank in range(WORLD):
        model.zero_grad()
        for micro in micros:
            inputs, targets = (x.double() for x in batch(step, micro, rank))
            ((model(inputs) - targets).square().mean() / case.accumulation).backward()
        found.append([p.grad.reshape(-1).numpy().copy() for p in model.parameters() if p.grad is not None])
    return found


def scaled(case: Own, grads: list[Array], weights: Array, sizes: list[int]) -> Array:
    if case.scaling == "AndMask":
        mean, factors = and_mask(grads, weights, 0.5)
        return mean * factors
    if case.scaling is not None:
        mean, factors = spread(grads, weights, sizes)
        return mean * factors
    return np.asarray(weights @ np.stack(grads))


def reduced(case: Own, grads: list[list[Array]], state: Array) -> tuple[list[Array], bool, list[Any]]:
    """Combined gradients by parameter, whether anything agreed, and (next state, elements) by decision."""
    num_params = len(grads[0])
    groups = [[p] for p in range(num_params)] if case.scope == "parameter" else [list(range(num_params))]
    combined: list[Array] = []
    agreed, following = False, []
    for group in groups:
        parts = [np.concatenate([worker[p] for p in group]) for worker in grads]
        sizes = [len(grads[0][p]) for p in group]
        of_group, took_part, next_state = mixed(case, parts, state, sizes)
        agreed |= took_part
        following.append((next_state, sum(sizes)))
        combined += np.split(of_group, np.cumsum(sizes)[:-1])
    return combined, agreed, following


def mixed(case: Own, grads: list[Array], state: Array, sizes: list[int]) -> tuple[Array, bool, Array]:
    """The combined gradient, whether the step is taken, and the next state."""
    if case.mixing == "Adasum":
        return adasum(grads), True, state
    if case.mixing == "AdaCons":
        combined, average = adacons_step(grads, list(state[0]) if state[1].all() else None, DECAY)
        return combined, True, np.stack([average, np.ones(WORLD)])
    weights, agreed, following = trust(grads, state[0], DECAY, SKIP_BELOW if case.skips else -2.0)
    return scaled(case, grads, weights, sizes), agreed, following[None]


def replay(case: Own) -> list[tuple[list[Array], Array, int]]:
    model = new_model().double()
    state, skipped, out = np.zeros(({"Adasum": 0, "AdaCons": 2}.get(case.mixing, 1), WORLD)), 0, []
    for step in range(STEPS):
        all_micros = range(case.accumulation)
        reductions = [[micro] for micro in all_micros] if case.stage == 2 else [list(all_micros)]
        total, agreed, following = [np.zeros(p.numel()) for p in model.parameters()], False, []
        for micros in reductions:
            combined, took_part, states = reduced(case, gradients(model, case, step, micros), state)
            total = [a + b for a, b in zip(total, combined, strict=True)]
            agreed, following = agreed or took_part, following + states
        if agreed:
            elements = sum(num for _, num in following)
            state = sum((next_state * num for next_state, num in following), np.zeros_like(state)) / elements
            for p, gradient in zip(model.parameters(), total, strict=True):
                p.data -= LR * torch.from_numpy(gradient).view_as(p)
        skipped += not agreed
        out.append(([p.detach().numpy().copy() for p in model.parameters()], state, skipped))
    return out


@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_replay(name: str) -> None:
    replayed = replay(CASES[name])
    for rank in results():
        for (weights, state, skipped), (wanted, wanted_state, wanted_skipped) in zip(
            rank[name], replayed, strict=True
        ):
            assert skipped == wanted_skipped
            np.testing.assert_allclose(np.reshape(state, (-1, WORLD)), wanted_state, rtol=1e-5, atol=1e-7)
            for found, expected in zip(weights, wanted, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_same_on_every_rank(name: str) -> None:
    first = results()[0][name]
    for rank in results()[1:]:
        assert [state for _, state, _ in rank[name]] == [state for _, state, _ in first]


@pytest.mark.parametrize("name", CASES)
def test_a_resume_goes_on_bit_for_bit(name: str) -> None:
    for rank in results():
        for (weights, state, skipped), (again, state_again, skipped_again) in zip(
            rank[name][RESUMED_AT:], rank[f"{name}, resumed"], strict=True
        ):
            assert state == state_again and skipped == skipped_again
            assert all(map(np.array_equal, weights, again))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.skips])
def test_a_skipped_step_leaves_the_state(name: str) -> None:
    states = [state for _, state, _ in results()[0][name]]
    skipped = [number for _, _, number in results()[0][name]]
    assert skipped[OPPOSED_AT] > skipped[OPPOSED_AT - 1] and states[OPPOSED_AT] == states[OPPOSED_AT - 1]
    assert states[OPPOSED_AT - 1] != states[OPPOSED_AT - 2]
    assert skipped[-1] < STEPS - 2


def test_too_few_workers_are_told_on_every_rank() -> None:
    wanted = "gradmix.mixing.params.num_byzantine: is 2; allowed: an integer, >= 0, <= 1 with 4 workers; "
    assert [rank["refused"] for rank in results()] == [f"{wanted}lower it, or use 5 workers or more"] * WORLD
