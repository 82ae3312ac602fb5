"""Each worker's own extrapolated point: equal to a replay, visible to training alone, exact to leave and to
resume.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradmix.config import ConfigError, parse_block
from ds_gradmix.ops.rounding import round_stochastically
from ds_gradmix.rules import Noise, PastGradient
from ds_gradmix.weights.extrapolated import Phase
from tests.support.blocks import BOTH, ONE_OWNER, TINY, noise, past
from tests.support.engines import ENGINES, log_lines
from tests.support.models import Regression
from tests.support.ranks import run_ranks
from tests.support.replay import replay
from tests.support.training import LR, Case, build, equal, loss_of, relative, run_cases, train, weights_of

NOISE = noise(std=0.01)
GAF = {"mixing": {"type": "GAF", "params": {"threshold": 0.8}}}  # skips some steps
CASES: dict[int, dict[str, Case]] = {
    1: {"extragradient": Case(past(lr=LR), stage=1), "accumulated": Case(past(lr=LR), accumulation=2)},
    2: {
        f"stage {stage}, accumulation {accumulation}": Case(
            past(lr=0.1), stage=stage, accumulation=accumulation, bucket=ONE_OWNER
        )
        for stage in (0, 1, 2)
        for accumulation in (1, 2)
    },
    3: {
        "ratio, two groups": Case(past(lr_ratio=1.5), two_groups=True, accumulation=2, bucket=ONE_OWNER),
        "layerwise": Case(past(lr=0.01, layerwise=True), stage=1),
        "gaf, skips": Case({**GAF, **past(lr=0.1)}, accumulation=2),
        "gaf, skips, stage 1": Case({**GAF, **past(lr=0.1)}, stage=1, accumulation=2),
        "ratio, two groups, stage 0": Case(past(lr_ratio=1.5), stage=0, two_groups=True, accumulation=2),
        "layerwise, stage 0": Case(past(lr=0.01, layerwise=True), stage=0),
        "gaf, skips, stage 0": Case({**GAF, **past(lr=0.1)}, stage=0, accumulation=2),
        "overlap": Case(past(lr=0.1), zero={"overlap_comm": True}, bucket=ONE_OWNER),
        "overlap, stage 1": Case(past(lr=0.1), stage=1, accumulation=2, zero={"overlap_comm": True}),
        "round robin": Case(past(lr=0.1), zero={"round_robin_gradients": True}, bucket=2000),
        "reduce to owners": Case(past(lr=0.1), zero={"use_multi_rank_bucket_allreduce": False}),
        "not contiguous": Case({**GAF, **past(lr=0.1)}, zero={"contiguous_gradients": False}, accumulation=2),
        "all-reduced": Case(past(lr=0.1), zero={"reduce_scatter": False}, accumulation=2),
        "offload": Case(past(lr=0.1), zero={"offload_optimizer": {"device": "cpu"}}, accumulation=2),
    },
    4: {
        f"gaf vrgd, stage {stage}": Case({**BOTH, **TINY, **past(lr=0.05)}, stage=stage, accumulation=2)
        for stage in (0, 1, 2)
    },
}


@cache
def runs(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, run_cases, CASES[world])


@pytest.mark.parametrize("world, name", [(world, name) for world, cases in CASES.items() for name in cases])
def test_training_equals_the_replay(world: int, name: str) -> None:
    ranks = [rank[name] for rank in runs(world)]
    case = CASES[world][name]
    expected = replay(case, world, ranks[0]["buckets"])
    plain = Case(**{**case.__dict__, "block": {k: v for k, v in case.block.items() if k != "extrapolation"}})
    assert relative(replay(plain, world, ranks[0]["buckets"])["weights"], expected["weights"]) > 1e-4
    for rank in ranks:
        assert relative(rank["weights"], expected["weights"]) < 1e-5
        assert rank["skipped"] == expected["skipped"]
    if "skips" in name:
        assert 0 < expected["skipped"][-1] < case.steps


def looking(case: Case, folder: str, disturb: bool) -> dict[str, Any]:
    """Four steps; at the third, if asked, evaluations, saves and an exception in the middle of the window."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = build(case)
    rank = torch.distributed.get_rank()
    x = torch.ones(2, 13, dtype=next(engine.parameters()).dtype)
    seen: dict[str, Any] = {}

    def look(name: str) -> None:
        seen[name] = weights_of(engine)

    def evaluate() -> Any:
        with torch.no_grad():
            return engine(x).float().numpy().copy()

    if disturb:
        seen["before the first step"] = evaluate()
    train(engine, case, 0, 2)
    look("theta")
    if disturb:
        engine.eval()
        seen["evaluated"] = [evaluate()]
        engine.train()
    loss = loss_of(engine, 2, 0, rank, case)
    look("after a training forward")
    if disturb:
        seen["evaluated"] += [evaluate(), evaluate()]  # between forward and backward, in training mode
        look("after an evaluation")
    engine.backward(loss)
    engine.step()
    if disturb and case.accumulation > 1:
        if rank == 0:  # alone: nobody else has to take part
            engine.eval()
            seen["evaluated"].append(evaluate())
            engine.train()
            seen["state dict"] = {n: p.double().numpy().copy() for n, p in engine.module_state_dict().items()}
        engine.save_checkpoint(folder, tag="window")
        engine.save_16bit_model(folder, "weights.bin")
        torch.distributed.barrier()  # rank 0 writes
        saved = torch.load(f"{folder}/window/mp_rank_00_model_states.pt", weights_only=False)["module"]
        seen["checkpoint"] = {n: p.double().numpy() for n, p in saved.items()}
        exported = torch.load(f"{folder}/weights.bin", weights_only=False)
        seen["export"] = {n: p.double().numpy() for n, p in exported.items()}
        if hasattr(engine.optimizer, "average_tensor"):  # DeepSpeed reads no others
            masters = get_fp32_state_dict_from_zero_checkpoint(folder, tag="window")
            seen["zero_to_fp32"] = {n: p.detach().double().numpy() for n, p in masters.items()}
        if case.stage > 0:  # or there are no partitions of master weights
            full = safe_get_full_fp32_param(engine.module.second.weight)
            seen["fp32"] = full.double().numpy()
        with pytest.raises(RuntimeError):
            engine(torch.ones(2, 999, dtype=x.dtype))
        look("after an exception")
        seen["evaluated"].append(evaluate())
    for micro in range(1, case.accumulation):
        engine.backward(loss_of(engine, 2, micro, rank, case))
        look("before the step")
        engine.step()
    look("after the step")
    train(engine, case, 3, 4)
    look("end")
    return seen


def looking_everywhere(folder: str) -> dict[str, Any]:
    out = {}
    for name, block in (("past", past(lr=0.3)), ("noise", NOISE)):
        for engine, kind in ENGINES.items():
            case = Case(block, accumulation=2, **kind)
            pair = [looking(case, f"{folder}/{name} {engine}", disturb) for disturb in (True, False)]
            out[f"{name}, {engine}"] = pair
    return out


def test_only_training_sees_the_offset(tmp_path: Path) -> None:
    ranks = run_ranks(2, looking_everywhere, str(tmp_path))
    for name in ranks[0]:
        points = [rank[name][0]["after a training forward"] for rank in ranks]
        assert not equal(*points), name  # each worker's own
    for rank, results in enumerate(ranks):
        for name, (seen, quiet) in results.items():
            theta = seen["theta"]
            assert not equal(seen["after a training forward"], theta), name
            assert equal(seen["after an evaluation"], theta), name
            assert not equal(seen["after an exception"], theta), name
            assert equal(seen["before the step"], theta), name  # at the last reduction everything is back
            assert not equal(seen["after the step"], theta), name
            for part in ("checkpoint", "export", *(("state dict",) if rank == 0 else ())):
                assert equal(seen[part], theta), (name, part)
            if name.endswith(("ZeRO-1", "ZeRO-2")):  # in 16 bits theta is rounded
                assert np.array_equal(seen["fp32"], theta["second.weight"]), name
                assert equal(theta, seen["zero_to_fp32"]), name
            elif "fp32" in seen:
                rounded = torch.from_numpy(seen["fp32"]).bfloat16().double().numpy()
                assert np.array_equal(rounded, theta["second.weight"]), name
            first, *others = seen["evaluated"]
            assert len(others) == (4 if rank == 0 else 3)
            assert all(np.array_equal(other, first) for other in others), name
            assert not np.array_equal(first, seen["before the first step"]), name
            assert equal(seen["end"], quiet["end"]), name  # no evaluation left a trace


def dropping() -> dict[str, Any]:
    """Skipped and overflowing steps: theta is back, bit for bit, and the next step has no offset."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    out = {}
    for engine_name in ("ZeRO-0", "BF16_Optimizer", "ZeRO-1", "ZeRO-2"):
        for name, extra, config in (
            ("skip", {"mixing": {"type": "GAF", "params": {"threshold": 2.0}}}, {}),
            ("overflow", {}, {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}),
            ("nonfinite", {"nonfinite": "drop"}, {}),
        ):
            kind = ENGINES[engine_name]
            if engine_name == "BF16_Optimizer":  # looks for overflows itself
                config = {"bf16": {"enabled": True}, **kind["config"]}
            case = Case({**past(lr=0.3), **extra}, **{**kind, "config": config})
            engine = build(case)
            rank = torch.distributed.get_rank()
            dtype = next(engine.parameters()).dtype
            states = []
            for step in range(4):
                x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step)).to(dtype)
                if step == 2 and rank == 1 and name != "skip":
                    x[0, 0] = float("nan")
                if name == "skip":
                    mixing = engine.optimizer.gradmix.config.mixing
                    object.__setattr__(mixing, "threshold", 0.0 if step == 2 else 2.0)
                    x = x + rank  # or everybody agrees
                before = weights_of(engine)
                loss = (engine(x).float() ** 2).mean()
                ahead = not equal(weights_of(engine), before)
                engine.backward(loss)
                engine.step()
                states.append((ahead, equal(weights_of(engine), before)))
            out[f"{name}, {engine_name}"] = states
    return out


def test_the_offset_is_dropped_with_the_step() -> None:
    for rank in run_ranks(2, dropping):
        for name, states in rank.items():
            # At step 1 and 2 there is an offset; step 2 changes nothing, or what the finite worker wants.
            expected = [
                (False, False),
                (True, False),
                (True, not name.startswith("nonfinite")),
                (False, False),
            ]
            assert states == expected, name


def resuming(folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, block in (("past", past(lr=0.3)), ("noise", NOISE), ("all", {**BOTH, **past(lr_ratio=2.0)})):
        for engine_name in ENGINES if name == "past" else ("ZeRO-0", "BF16_Optimizer", "ZeRO-1", "ZeRO-2"):
            case = Case(block, accumulation=2, steps=5, **ENGINES[engine_name])
            whole = train(build(case), case)
            engine = build(case)
            train(engine, case, 0, 3)
            engine.save_checkpoint(f"{folder}/{name} {engine_name}")
            resumed = build(case)
            train(resumed, case, 0, 1)
            loss_of(resumed, 1, 0, torch.distributed.get_rank(), case)  # an offset of its own, which must go
            resumed.load_checkpoint(f"{folder}/{name} {engine_name}")
            out[f"{name}, {engine_name}"] = (whole["weights"], train(resumed, case, 3, 5)["weights"])
    return out


def test_resuming_is_exact(tmp_path: Path) -> None:
    for rank in run_ranks(2, resuming, str(tmp_path)):
        for name, (whole, rest) in rank.items():
            assert equal(rest, whole), name


class Breaking(Regression):
    """Its backward fails, when told to, after some gradients have been reduced."""

    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.fails:
            hidden.register_hook(self.fail)
        return self.last(torch.tanh(self.second(torch.tanh(self.frozen(hidden))))) * self.scale

    def fail(self, _: torch.Tensor) -> None:
        raise RuntimeError("out of memory, say")


def breaking() -> list[bool]:
    case = Case(past(lr=0.3), bucket=ONE_OWNER)
    engine = build(case, Breaking())
    rank = torch.distributed.get_rank()
    train(engine, case, 0, 2)
    theta = weights_of(engine)
    engine.module.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.backward(loss_of(engine, 2, 0, rank, case))
    engine.module.fails = False
    with torch.no_grad():
        engine(torch.ones(1, 13))
    return [
        bool(engine.optimizer.gradmix.weights.phase is Phase.NO_GRADIENT),
        equal(weights_of(engine), theta),
    ]


def test_a_backward_that_breaks_off_loses_nothing() -> None:
    assert run_ranks(2, breaking) == [[True, True]] * 2


def stray(name: str) -> list[Any]:
    """A training forward between the last backward of a step and the step; boundaries set by hand."""
    case = Case(past(lr=0.3), **ENGINES[name])
    rank = torch.distributed.get_rank()
    out: list[Any] = []
    for disturb in (False, True):
        engine = build(case)
        for step in range(3):
            engine.backward(loss_of(engine, step, 0, rank, case))
            if disturb:
                loss_of(engine, step, 1, rank, case)
            engine.step()
            after = weights_of(engine)
            with torch.no_grad():
                engine(torch.ones(1, 13, dtype=next(engine.parameters()).dtype))
            out.append(equal(weights_of(engine), after))
        out.append(after)
    return out


def stray_all() -> list[Any]:
    return [stray(name) for name in ENGINES]


def test_a_forward_before_the_step_changes_nothing() -> None:
    for rank in run_ranks(2, stray_all):
        for told in rank:
            assert told[:3] == told[4:7] == [True] * 3 and equal(told[3], told[7])


def window_by_hand() -> list[float]:
    case = Case(past(lr=0.3))
    engine = build(case)
    rank = torch.distributed.get_rank()
    for micro, boundary in ((0, False), (1, True)):
        engine.set_gradient_accumulation_boundary(boundary)
        engine.backward(loss_of(engine, 0, micro, rank, case))
        engine.step()
    kept = (
        engine.optimizer.gradmix.weights._buffer[0].double()
        / engine.optimizer.gradmix.weights._gradient_scale
    )
    exact = Regression().double()
    for micro in range(2):
        loss_of(exact, 0, micro, rank, Case({}, dtype="fp64")).backward()
    norm = sum(float(p.grad.square().sum()) for p in exact.parameters() if p.grad is not None) ** 0.5
    return [float(kept.norm()), norm]


def test_the_whole_window_counts_when_boundaries_are_set_by_hand() -> None:
    for found, expected in run_ranks(2, window_by_hand):
        assert found == pytest.approx(expected, rel=1e-5)


def setting() -> list[bool]:
    """Master weights written in the middle of a window: they count, and the offset does not come back with
    them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    told = []
    for name in ("BF16_Optimizer", "ZeRO-1", "ZeRO-2"):
        case = Case(past(lr=0.3), accumulation=2, **ENGINES[name])
        engine = build(case)
        rank = torch.distributed.get_rank()
        train(engine, case, 0, 2)
        engine.backward(loss_of(engine, 2, 0, rank, case))
        engine.step()
        bias = engine.module.second.bias
        safe_set_full_fp32_param(bias, torch.full_like(bias, 0.5))
        told.append(bool((safe_get_full_fp32_param(bias) == 0.5).all()))
        engine.backward(loss_of(engine, 2, 1, rank, case))
        engine.step()
        told.append(
            torch.equal(safe_get_full_fp32_param(bias).to(bias.dtype), bias.detach())
            and bool((bias - 0.5).abs().max() < 0.2)
        )
    return told


def test_master_weights_can_be_set() -> None:
    assert run_ranks(2, setting) == [[True] * 6] * 2


def saving(folder: str) -> None:
    for stage in (0, 2):
        for name, block in (("with", past(lr=0.3)), ("without", None)):
            engine = build(case := Case(block, stage=stage))
            train(engine, case, 0, 2)
            engine.save_checkpoint(f"{folder}/{name} {stage}")


def loading_all(folder: str, name: str, states: bool) -> list[tuple[list[str], bool, bool]]:
    return [loading(folder, name, states or stage == 0, stage) for stage in (0, 2)]


def loading(folder: str, name: str, states: bool, stage: int) -> tuple[list[str], bool, bool]:
    """What is warned of, and whether the first and the second step after have an offset."""
    case = Case(past(lr=0.3), stage=stage)
    engine = build(case)
    with log_lines() as lines:
        engine.load_checkpoint(f"{folder}/{name} {stage}", load_optimizer_states=states)
    offsets = []
    for step in (2, 3):
        before = weights_of(engine)
        loss = loss_of(engine, step, 0, torch.distributed.get_rank(), case)
        offsets.append(not equal(weights_of(engine), before))
        engine.backward(loss)
        engine.step()
    return list(lines), offsets[0], offsets[1]


def test_checkpoints_without_past_gradients(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(2, saving, folder)
    assert run_ranks(2, loading_all, folder, "with", True) == [[([], True, True)] * 2] * 2
    for world, name, states in ((2, "without", True), (1, "with", False)):  # another number of ranks
        first_rank, *others = run_ranks(world, loading_all, folder, name, states)
        for lines, first, second in first_rank:
            assert len(lines) == 1 and "starts afresh" in lines[0] and (first, second) == (False, True)
        assert all(other == [([], False, True)] * 2 for other in others)


def extents() -> list[list[int]]:
    """Buffers, in copies of the parameters: at most one, or two for ZeRO-2 with accumulation."""
    found = []
    for block, stage, accumulation in (
        (past(lr=0.1), 0, 2),
        (NOISE, 0, 1),
        (past(lr=0.1), 1, 2),
        (past(lr=0.1), 2, 1),
        (past(lr=0.1), 2, 2),
        (NOISE, 2, 2),
    ):
        weights = build(
            Case(block, stage=stage, accumulation=accumulation, dtype="bf16")
        ).optimizer.gradmix.weights
        buffers = [*weights._buffer, *((weights._window and weights._window._sums) or ())]
        parameters = sum(flat.numel() for flat in weights._layout.flats)
        assert all(buffer.dtype == torch.bfloat16 for buffer in buffers)
        found.append(sum(buffer.numel() for buffer in buffers) // parameters)
    return found


def test_memory() -> None:
    assert run_ranks(2, extents)[0] == [1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_stochastic_rounding(dtype: torch.dtype, unit: float) -> None:
    """An offset of a tenth of a unit in the last place is lost by rounding to nearest, and there on average
    here.
    """
    random = torch.Generator().manual_seed(3)
    for value, scale in ((1.0, 2.0), (-1.5, 2.0), (3.0, 4.0), (0.0, 0.0)):
        step = unit * scale * 0.1 if scale else 1e-9 if dtype == torch.float16 else 1e-41
        wanted = torch.full((200_000,), value + step, dtype=torch.float32)
        rounded = round_stochastically(wanted.clone(), dtype, random)
        assert rounded.dtype == dtype and torch.equal(
            wanted.to(dtype).float(), torch.full_like(wanted, value)
        )
        moved = float((rounded.double() - value).mean())
        assert abs(moved - step) < 0.05 * step, (value, moved, step)  # standard error: 0.7 % of it
        assert len(rounded.unique()) == 2
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(exact.clone(), dtype, random), exact.to(dtype))
    assert round_stochastically(torch.tensor([float("nan")]), dtype, random).isnan().all()
    assert round_stochastically(exact, torch.float32, random) is exact


def test_rules_alone() -> None:
    random = torch.Generator().manual_seed(0)
    like, norms, sizes = torch.zeros(100_000), torch.tensor([2.0, 8.0]), torch.tensor([4.0, 16.0])
    for distribution in ("gaussian", "uniform"):
        rule = Noise(distribution=distribution, std=0.5)
        drawn = rule.direction(like, random)
        assert abs(float(drawn.std()) - 1) < 0.01 and abs(float(drawn.mean())) < 0.01
        assert rule.scale(0.1) == 0.5
    assert Noise(std_ratio=0.1).scales(norms, norms, sizes, 0.1).tolist() == pytest.approx([0.1, 0.2])
    past_norms = torch.tensor([4.0, 0.0])
    assert PastGradient(lr=0.3).scale(0.1) == -0.3
    assert PastGradient(lr_ratio=3.0).scale(0.1) == pytest.approx(-0.3)
    layerwise = PastGradient(lr=0.3, layerwise=True)
    assert layerwise.scale(0.1) is None
    assert layerwise.scales(norms, past_norms, sizes, 0.1).tolist() == pytest.approx([-0.15, 0.0])
    assert PastGradient(lr=1.0).direction(torch.ones(2), random).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "params, words",
    [({}, "exactly one of lr"), ({"lr": 1, "lr_ratio": 1}, "exactly one of lr"), ({"lr": -1}, ">= 0")],
)
def test_mistakes(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_block(past(**params))
    with pytest.raises(ConfigError, match="exactly one of std"):
        parse_block({"extrapolation": {"type": "noise"}})
