"""What a step does besides combining: refusing, skipping, overflowing, checkpointing, noticing that ranks
differ.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradmix.config import ConfigError
from tests.support.blocks import GAF, SKETCH, SMOOTH, SUMMED, TINY
from tests.support.engines import ENGINES, build_with, log_lines
from tests.support.models import Regression
from tests.support.ranks import RankError, run_ranks
from tests.support.training import Case, build, ds_config, loss_of, train, weights_of

NEVER: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 0.0}}}  # nobody ever agrees


def refusals() -> dict[str, str]:
    """What is refused when an engine is built, and in which words."""

    tries: dict[str, Any] = {
        "hpZ": lambda: build_with({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}),
        "misspelt rule": lambda: build_with({"gradmix": {"mixing": {"type": "gfa"}}}),
        "model scope": lambda: build_with({"gradmix": {**GAF, "scope": "model"}}),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "built"
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_refused_when_the_engine_is_built() -> None:
    first, second = run_ranks(2, refusals)
    assert first == second
    words = {
        "hpZ": "zero_optimization.zero_hpz_partition_size: 2",
        "misspelt rule": 'did you mean "GAF"?',
        "model scope": "set stage to 1",
    }
    for name, word in words.items():
        assert word in first[name], name


def announcements() -> dict[str, list[str]]:
    said = {}
    configs: dict[str, dict[str, Any]] = {"active": {"gradmix": GAF}, "none": {}, "misspelt": {"gradmx": GAF}}
    for name, config in configs.items():
        base = {k: v for k, v in ds_config(Case(None)).items()}
        with log_lines() as lines:
            import deepspeed

            import ds_gradmix

            ds_gradmix.enable()
            deepspeed.initialize(model=Regression(), optimizer=None, config={**base, **config})
        said[name] = list(lines)
    return said


def monitored(folder: str) -> list[tuple[list[str], dict[str, float]]]:
    """What was logged after the engine was built, and the last step's numbers; once with telemetry, and with
    DeepSpeed's timers.
    """
    found = []
    for stage in (0, 2):
        monitor = {"enabled": True, "output_path": folder, "job_name": f"stage {stage}"}
        config = {"csv_monitor": monitor, "steps_per_print": 2, "wall_clock_breakdown": stage == 2}
        case = Case(GAF | {"telemetry": stage == 2}, stage=stage, config=config, steps=2)
        engine = build(case)
        log, path = engine.timers.log, Path(folder) / f"timers {engine.global_rank}"

        def noting(names: list[str], *args: Any, log: Any = log, path: Path = path, **kwargs: Any) -> None:
            with path.open("a") as file:
                file.write(f"{names} {engine.timers('gradmix').elapsed(reset=False)}\n")  # noqa: B023
            log(names, *args, **kwargs)

        engine.timers.log = noting
        with log_lines() as lines:
            told = train(engine, case)["stats"]
        found.append((lines, told[-1]))
    return found


def test_decisions_are_told_to_monitors_and_the_log(tmp_path: Path) -> None:
    first, second = run_ranks(2, monitored, str(tmp_path))
    for stage in (0, 2):
        lines = (tmp_path / f"stage {stage}" / "Train_GradMix_kept_fraction.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", "8", "16"]  # samples
    for lines, numbers in first:
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if "/" not in name)
        assert lines == [f"ds_gradmix: step 2: {told}"] and "kept_fraction" in numbers
    assert not any(lines for lines, _ in second)
    for name in ("worker_norm_0", "worker_agreement_1", "noise_scale", "seconds"):
        lines = (tmp_path / "stage 2" / f"Train_GradMix_{name}.csv").read_text().splitlines()
        number = first[1][1][name.replace("norm_", "norm/").replace("agreement_", "agreement/")]
        assert len(lines) == 3 and float(lines[-1].split(",")[1]) == number
    timers = (tmp_path / "timers 0").read_text().splitlines()
    ours = [line for line in timers if "'gradmix'" in line]
    assert len(ours) == 2 and all(float(line.split()[-1]) > 0 for line in ours)


def test_rank_0_says_in_one_line_what_is_active() -> None:
    first, second = run_ranks(2, announcements)
    assert all(len(lines) == 1 for lines in first.values()) and not any(second.values())
    assert "active over 2 workers, ZeRO-2" in first["active"][0] and "GAF(threshold=1.0" in first["active"][0]
    assert "NOT active" in first["none"][0]
    assert "NOT active" in first["misspelt"][0] and '"gradmx"' in first["misspelt"][0]


def skipping(case: Case) -> dict[str, Any]:
    """One step everybody agrees on, two with nobody; then the state must be as after the first."""
    engine = build(case)
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    engine.lr_scheduler = scheduler
    checks = getattr(optimizer, "check_grad_overflow", None)
    object.__setattr__(optimizer.gradmix.config.mixing, "threshold", 2.0)
    train(engine, case, 0, 1)

    def state() -> dict[str, Any]:
        return {
            "weights": weights_of(engine),
            "lr": scheduler.get_last_lr(),
            "momentum": [s["momentum_buffer"].clone() for s in inner.state.values()],
            "p": [mean.clone() for mean in optimizer.gradmix.momentum.state_dict()["means"].values()],
            "p steps": optimizer.gradmix.momentum.state_dict()["steps"],
            "scale": getattr(optimizer, "loss_scale", None),
        }

    before = state()
    object.__setattr__(optimizer.gradmix.config.mixing, "threshold", 0.0)
    during = train(engine, case, 1, 3)
    after = state()
    flags = (getattr(optimizer, "check_grad_overflow", None) == checks, engine.global_steps)
    object.__setattr__(optimizer.gradmix.config.mixing, "threshold", 2.0)
    train(engine, case, 3, 4)
    return {"before": before, "after": after, "later": state(), "during": during, "flags": flags}


def skipping_all() -> dict[str, Any]:
    return {name: skipping(Case({**GAF, **SMOOTH, **TINY}, **kind)) for name, kind in ENGINES.items()}


@cache
def skipped_runs() -> list[dict[str, Any]]:
    return run_ranks(2, skipping_all)


@pytest.mark.parametrize("name", ENGINES)
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    for rank in skipped_runs():
        run = rank[name]
        assert run["during"]["skipped"] == [1, 2]
        assert [told["skipped"] for told in run["during"]["stats"]] == [1.0, 1.0]
        np.testing.assert_equal(run["after"]["weights"], run["before"]["weights"])
        for key in ("lr", "p steps", "scale"):
            assert run["after"][key] == run["before"][key], key
        for key in ("momentum", "p"):
            for ours, theirs in zip(run["after"][key], run["before"][key], strict=True):
                assert torch.equal(ours, theirs), key
        assert run["flags"] == (True, 3)
        assert run["later"]["p steps"] == 2 and run["later"]["lr"] == [run["before"]["lr"][0] / 2]
        changed = run["later"]["weights"]["first.weight"] != run["after"]["weights"]["first.weight"]
        assert changed.any()


def overflowing() -> list[Any]:
    """fp16 with dynamic loss scaling: DeepSpeed must see one worker's overflow, whatever the rule."""
    from deepspeed.accelerator import get_accelerator

    import ds_gradmix

    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but true arithmetic
    told = []
    sketches = [{**GAF, **SKETCH}, {**GAF, **SKETCH, **SUMMED, "scope": "parameter"}]
    blocks = [*sketches, GAF, {**GAF, "scope": "parameter"}, {"scaling": {"type": "VRGD"}}, {**GAF, **SMOOTH}]
    blocks += [{"mixing": {"type": "GradientMix"}}, {}, NEVER]
    for block, (stage, kind) in itertools.product(
        blocks, ((2, "Zero"), (0, "Unfused"), (0, "FP16_Optimizer"))
    ):
        fp16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}
        config = {"gradmix": block, "fp16": fp16, "zero_optimization": {"stage": stage}}
        engine = build_with(config, fused=kind == "FP16_Optimizer")
        assert kind in type(engine.optimizer).__name__
        rank = torch.distributed.get_rank()
        scales = []
        for step in range(3):
            x = torch.randn(4, 13, generator=torch.Generator().manual_seed(rank + 10 * step)).half()
            if step == 1 and rank == 1:
                x[0, 0] = float("inf")
            before = weights_of(engine)
            engine.backward((engine(x).float() ** 2).mean())
            engine.step()
            same = all(np.array_equal(a, before[n]) for n, a in weights_of(engine).items())
            scales.append((engine.optimizer.loss_scale, engine.skipped_steps, same))
            assert all(np.isfinite(value) for value in ds_gradmix.stats(engine).values())
        told.append(scales)
    return told


def test_overflow_reaches_the_loss_scaler() -> None:
    for rank in run_ranks(2, overflowing):
        for scales in rank[:-3]:
            assert scales == [(256.0, 0, False), (128.0, 1, True), (128.0, 1, False)]
        # Disagreement leaves the scale alone; only the overflow halves it.
        for scales in rank[-3:]:
            assert scales == [(256.0, 1, True), (128.0, 2, True), (128.0, 3, True)]


def nonfinite() -> dict[str, Any]:
    """A worker with a NaN at step 1, dropped; then all of them."""
    out: dict[str, Any] = {}
    for name in ("ZeRO-0", "ZeRO-0 bf16", "BF16_Optimizer"):
        sketched = {**GAF, "gram": {"sketch": 400}, **SUMMED}
        for kind, block in (
            ("mean", {}),
            ("gaf", GAF),
            ("momentum", {**GAF, **SMOOTH}),
            ("sketch", sketched),
        ):
            case = Case({**block, "nonfinite": "drop"}, nan_at=(1, 1), steps=3, **ENGINES[name])
            run = train(build(case), case)
            finite = all(np.isfinite(w).all() for w in run["weights"].values())
            out[f"{name} {kind}"] = (
                finite,
                [told["dropped_workers"] for told in run["stats"]],
                run["skipped"],
            )
        everybody = Case(
            {"nonfinite": "drop"}, nan_at=(1, torch.distributed.get_rank()), steps=3, **ENGINES[name]
        )
        run = train(build(everybody), everybody)
        out[f"{name}, all"] = (run["skipped"], all(np.isfinite(w).all() for w in run["weights"].values()))
        runs = [
            train(build(case := Case(b, nan_at=(1, 1), steps=2, **ENGINES[name])), case) for b in (GAF, None)
        ]
        out[f"{name}, propagate"] = [
            (run["skipped"], bool(np.isnan(run["weights"]["scale"]))) for run in runs
        ]
    blocks = {"mean": {}, "gaf": GAF, "gradientmix": {"mixing": {"type": "GradientMix"}}, "vrgd": SMOOTH}
    blocks["by parameter"] = {"mixing": {"type": "GradientMix", "params": {"granularity": "parameter"}}}
    blocks["sketch"], blocks["summed"] = {**GAF, "gram": {"sketch": 400}}, SUMMED
    blocks["gaf by parameter"] = {**GAF, "scope": "parameter"}
    for name, block in blocks.items():
        case = Case({**block, "nonfinite": "drop"}, nan_at=(1, 1), steps=3)
        run = train(build(case), case)
        finite = all(np.isfinite(w).all() for w in run["weights"].values())
        out[name] = (finite, [told["dropped_workers"] for told in run["stats"]], run["skipped"])
        everybody = Case({**block, "nonfinite": "drop"}, nan_at=(1, torch.distributed.get_rank()), steps=3)
        run = train(build(everybody), everybody)
        out[f"{name}, all"] = (run["skipped"], all(np.isfinite(w).all() for w in run["weights"].values()))
    case = Case({**GAF, "scope": "model", "nonfinite": "drop"}, stage=1, nan_at=(1, 1), steps=3)
    run = train(build(case), case)
    out["model"] = (all(np.isfinite(w).all() for w in run["weights"].values()), run["skipped"])
    for name, block in (("propagate", GAF), ("sketch propagate", {**GAF, **SKETCH}), ("stock", None)):
        case = Case(block, nan_at=(1, 1), steps=2)
        out[name] = train(build(case), case)["skipped"]
    return out


def test_nonfinite_workers() -> None:
    for rank in run_ranks(3, nonfinite):
        assert rank.pop("sketch propagate") == [0, 1]
        assert rank.pop("propagate") == rank.pop("stock") == [0, 1]  # what DeepSpeed does
        assert rank.pop("model") == (True, [0, 0, 0])
        for name, told in rank.items():
            if name.endswith(", propagate"):
                assert (
                    told[0] == told[1] == (([0, 0], True) if name == "ZeRO-0, propagate" else ([0, 1], False))
                ), name
            elif name.endswith(", all"):
                assert told == ([0, 1, 1], True), name
            else:
                assert told == (True, [0.0, 1.0, 0.0], [0, 0, 0]), name


EXACT = ("ZeRO-0", "ZeRO-0 bf16", "BF16_Optimizer", "ZeRO-1", "ZeRO-2")


def resuming(folder: str) -> dict[str, Any]:
    """Six steps at once, or three, a checkpoint, and three more in a new engine."""
    mix = {"mixing": {"type": "GradientMix"}, **SMOOTH}
    out: dict[str, Any] = {}
    for name in EXACT:
        case = Case({**mix, **TINY}, accumulation=2, steps=6, bucket=700, **ENGINES[name])
        whole = train(build(case), case)
        engine = build(case)
        train(engine, case, 0, 3)
        engine.save_checkpoint(f"{folder}/{name}")
        resumed = build(case)
        with log_lines() as lines:
            resumed.load_checkpoint(f"{folder}/{name}")
        rest = train(resumed, case, 3, 6)
        out[name] = (whole["weights"], rest["weights"], list(lines))
    for stage in (2, 0):
        out[f"changes, stage {stage}"] = changing(folder, stage)
    return out


def changing(folder: str, stage: int) -> dict[str, Any]:
    """Another block in the run that resumes."""
    out = {}
    plain, rule, smoothed, unsmoothed, mixed = (
        Case(block, stage=stage)
        for block in (None, GAF, SMOOTH, {"scaling": {"type": "VRGD"}}, {"mixing": {"type": "GradientMix"}})
    )
    changes = {
        "no block to rule": (plain, rule),
        "rule to no block": (rule, plain),
        "mixing to mixing": (rule, mixed),
        "no momentum to momentum": (unsmoothed, smoothed),
        "momentum to none": (smoothed, unsmoothed),
        "no scaling to scaling": (rule, smoothed),
        "weights only": (plain, smoothed),
    }
    for name, (before, after) in changes.items():
        engine = build(before)
        train(engine, before, 0, 1)
        engine.save_checkpoint(f"{folder}/{name} {stage}")
        resumed = build(after)
        with log_lines() as lines:
            resumed.load_checkpoint(f"{folder}/{name} {stage}", load_optimizer_states=name != "weights only")
        told = train(resumed, after, 1, 2)
        out[name] = (list(lines), all(np.isfinite(w).all() for w in told["weights"].values()))
    return out


def test_checkpoints(tmp_path: Path) -> None:
    first, second = run_ranks(2, resuming, str(tmp_path))
    for name in EXACT:
        for whole, rest, lines in (first[name], second[name]):
            np.testing.assert_equal(rest, whole)  # bit for bit
            assert not lines
    warned = {
        "no block to rule": "made without a gradmix block",
        "no momentum to momentum": "no momentum",
        "momentum to none": "is dropped",
        "no scaling to scaling": "scaling none, not VRGD",
    }
    for stage in ("changes, stage 2", "changes, stage 0"):
        for name in ("rule to no block", "mixing to mixing", "weights only", *warned):
            lines, finite = first[stage][name]
            assert finite and len(lines) == (name in warned), (stage, name, lines)
            assert warned.get(name, "") in " ".join(lines)
            assert not second[stage][name][0]


def other_shape() -> None:
    model = Regression()
    if torch.distributed.get_rank() == 1:
        model.second = torch.nn.Linear(31, 28)
    build_with({"gradmix": GAF}, model)


class Branching(Regression):
    """Has a gradient for a parameter on some ranks only."""

    branches = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = self.unused(x[:, :5])
        differs = self.branches and torch.distributed.get_rank() == 1
        return super().forward(x) + (more if differs else more.detach())


def other_gradients(block: dict[str, Any], stage: int, bucket: int) -> None:
    zero = {"stage": stage, "reduce_bucket_size": bucket}
    engine = build_with({"gradmix": block, "zero_optimization": zero}, Branching(empty=stage < 3))
    for step in range(2):
        # Before its first step ZeRO-3 gathers every parameter for backward, and hangs by itself.
        engine.module.branches = stage < 3 or step == 1
        engine.backward(loss_of(engine, step, 0, torch.distributed.get_rank(), Case({})))
        engine.step()


def other_block() -> None:
    build_with({"gradmix": {**GAF, "seed": torch.distributed.get_rank()}})


def coalesced() -> dict[str, Any]:
    """Several backwards, one reduction, by DeepSpeed's context manager; a decision for the whole model."""
    out = {}
    for scope in ("bucket", "model"):
        case = Case({**GAF, "scope": scope}, stage=1)
        engine = build(case)
        rank = torch.distributed.get_rank()
        with engine.coalesce_grad_reduction():
            for micro in range(2):
                engine.backward(loss_of(engine, 0, micro, rank, case))
        engine.step()
        out[scope] = weights_of(engine)
    return out


def test_coalesced_reduction_with_model_scope() -> None:
    for rank in run_ranks(2, coalesced):
        np.testing.assert_equal(rank["model"], rank["bucket"])  # one bucket is the model


def test_ranks_that_differ_do_not_hang() -> None:
    with pytest.raises(RankError, match="building the engine: rank 1 has gradmix block"):
        run_ranks(2, other_block, timeout=60)
    with pytest.raises(RankError, match=r"building the engine: rank 1 has second.weight \(28, 31\)"):
        run_ranks(2, other_shape, timeout=60)


@pytest.mark.parametrize(
    "block, stage, bucket",
    [(GAF, 2, 10**8), (GAF, 1, 10**8), (GAF, 2, 10), ({}, 2, 10), (GAF, 3, 10**8), ({}, 3, 10)],
)
def test_gradients_that_differ_do_not_hang(block: dict[str, Any], stage: int, bucket: int) -> None:
    with pytest.raises(RankError, match=r"MismatchError.*rank 1 has unused") as caught:
        run_ranks(2, other_gradients, block, stage, bucket, timeout=60)
    assert "unused" in str(caught.value)


def alone() -> list[Any]:
    out = []
    for name in ("ZeRO-2", "ZeRO-0", "BF16_Optimizer"):
        for block in (None, {**GAF, **SMOOTH}, {"mixing": {"type": "GradientMix"}, "nonfinite": "drop"}):
            case = Case(block, accumulation=2, steps=4, **ENGINES[name])
            with log_lines() as lines:
                engine = build(case)
                out.append((train(engine, case)["weights"], list(lines)))
    return out


def test_one_worker_is_the_identity() -> None:
    found = run_ranks(1, alone)[0]
    for (stock, _), *others in (found[:3], found[3:6], found[6:]):
        for weights, lines in others:
            np.testing.assert_equal(weights, stock)
            assert len(lines) == 1 and "is the identity" in lines[0]
