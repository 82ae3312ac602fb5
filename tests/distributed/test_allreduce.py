"""What only the adapter to engines that all-reduce meets: ZeRO-0 with plain torch optimizers and DeepSpeed's
16-bit ones, and BF16_Optimizer.
"""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.blocks import GAF, MIX, SMOOTH, TINY, noise, past
from tests.support.engines import ENGINES, fused_descent, log_lines
from tests.support.models import Regression
from tests.support.ranks import failures, run_ranks
from tests.support.training import LR, Case, build, ds_config, equal, loss_of, train, weights_of

ALL: dict[str, Any] = {**GAF, **SMOOTH, **TINY, **past(lr=0.1)}
PAST: dict[str, Any] = past(lr=0.3)
NOISE = noise(std=0.05)
GAF_MODEL: dict[str, Any] = {**GAF, "scope": "model"}
KINDS = ("ZeRO-0", "ZeRO-0 bf16", "BF16_Optimizer")


def rank() -> int:
    return torch.distributed.get_rank()


def case_of(name: str, block: dict[str, Any] | None, **options: Any) -> Case:
    kind = ENGINES[name]
    config = {**kind.get("config", {}), **options.pop("config", {})}
    return Case(block, **{**kind, "config": config, "steps": 4, **options})


def initialize(
    model: torch.nn.Module, optimizer: Any, block: dict[str, Any] | None, config: dict[str, Any] | None = None
) -> Any:
    import deepspeed

    import ds_gradmix

    ds_gradmix.enable()
    built = {**ds_config(Case(block, stage=0)), **(config or {})}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=built)[0]


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.5)


def steps(engine: Any, case: Case, first: int = 0, last: int = 4) -> dict[str, Any]:
    for step in range(first, last):
        engine.backward(loss_of(engine, step, 0, rank(), case))
        engine.step()
    return weights_of(engine)


def schedulers() -> None:
    """Built on the optimizer before the engine, and after; torch wraps the optimizer's step either way."""
    case = case_of("ZeRO-0", GAF)
    found = []
    for before in (True, False):
        model = Regression()
        optimizer = sgd(model)
        made = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _ in range(before)]
        engine = initialize(model, optimizer, GAF)
        made += [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _ in range(not before)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            for step in range(3):
                steps(engine, case, step, step + 1)
                made[0].step()
        found.append(weights_of(engine))
        assert made[0].get_last_lr() == [LR / 8] and engine.skipped_steps == 0
    assert equal(*found)


def outside() -> None:
    """Parameters that the optimizer does not have: averaged, but the rules are about the others alone."""
    for name in ("ZeRO-0", "ZeRO-0 bf16"):
        for block in (
            GAF,
            {**GAF, "scope": "model"},
            {"mixing": {"type": "GradientMix"}},
            PAST,
            NOISE,
        ):
            found = []
            case = case_of(name, block)
            for alone in (True, False):
                model = Regression()
                for p in model.last.parameters():
                    p.requires_grad_(not alone)
                known = [p for n, p in model.named_parameters() if not n.startswith(("frozen", "last"))]
                config = {"bf16": {"enabled": "bf16" in name}}
                engine = initialize(model, torch.optim.SGD(known, lr=LR), block, config)
                found.append(steps(engine, case))
                engine.backward(loss_of(engine, 4, 0, rank(), case))
                if not alone:
                    assert np.array_equal(found[-1]["last.weight"], weights_of(engine)["last.weight"])
                    grad = model.last.weight.grad
                    average = grad.float().clone()
                    torch.distributed.all_reduce(average)
                    torch.testing.assert_close(average / 2, grad.float())
            assert equal(*found), (name, block)


def strided() -> None:
    """Parameters, and so gradients, that are not contiguous any more: somebody has converted the model."""
    case = case_of("ZeRO-0", GAF, accumulation=2)
    for block in (
        {**GAF, **TINY},
        {**GAF, "scope": "model"},
        {"mixing": {"type": "GradientMix"}},
        ALL,
        NOISE,
    ):
        found = []
        for contiguous in (True, False):
            engine = build(case_of("ZeRO-0", block, accumulation=2))
            for p in (engine.module.first.weight, engine.module.second.weight):
                p.data = p.data if contiguous else p.data.t().contiguous().t()
            if not contiguous and "extrapolation" in block:
                with pytest.raises(ValueError, match=r"first.weight: its memory"):
                    train(engine, case)
                continue
            found.append(train(engine, case)["weights"])
            assert engine.module.first.weight.grad is None
        for other in found[1:]:  # the order of sums in the model
            assert all(np.allclose(other[n], w, rtol=1e-4, atol=1e-6) for n, w in found[0].items()), block


class Mixed(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.second.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x)).bfloat16()))
        return self.last(hidden.float()) * self.scale


def mixed() -> None:
    """Parameters of two dtypes, without the bf16 section."""
    for block in (GAF_MODEL, ALL, {**MIX, **NOISE}, {}):
        engine = build(case_of("ZeRO-0", block), Mixed())
        told = steps(engine, case_of("ZeRO-0", block))
        assert engine.module.second.weight.dtype == torch.bfloat16
        assert all(np.isfinite(w).all() for w in told.values())
        alike(engine)


class Tied(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.again = torch.nn.Linear(31, 29)
        self.again.weight = self.second.weight


def tied() -> None:
    """One parameter under two names."""
    engine = build(case_of("ZeRO-0", ALL), Tied())
    steps(engine, case_of("ZeRO-0", ALL))
    assert engine.module.again.weight is engine.module.second.weight
    alike(engine)


def alike(engine: Any) -> None:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    engine.eval()
    torch.distributed.all_gather_object(gathered, weights_of(engine))
    assert equal(gathered[0], gathered[-1])


def windows() -> None:
    """Several backwards a step: counted by DeepSpeed, under `no_sync`, by hand, and by the caller."""
    for name in KINDS:
        for block in (GAF, ALL):
            found = [train(build(case := case_of(name, block, accumulation=2)), case)["weights"]]
            case = case_of(name, block)
            for by_hand in (False, True):
                engine = build(case)
                for step in range(4):
                    with engine.no_sync():
                        engine.backward(loss_of(engine, step, 0, rank(), case) / 2)
                    if by_hand:
                        engine.set_gradient_accumulation_boundary(True)
                    engine.backward(loss_of(engine, step, 1, rank(), case) / 2)
                    engine.step()
                found.append(weights_of(engine))
            if block is GAF:
                case = case_of(name, block, config={"managed_gradient_accumulation": False})
                engine = build(case)
                for step in range(4):
                    for micro in range(2):
                        engine.backward(loss_of(engine, step, micro, rank(), case) / 2)
                    engine.step()
                found.append(weights_of(engine))
            assert all(equal(other, found[0]) for other in found[1:]), (name, block)


def unused_on_some() -> None:
    """DeepSpeed fills in missing gradients here: ranks that use different parameters do not differ."""
    for name in KINDS:
        case = case_of(name, ALL)
        engine = build(case, Branching())
        steps(engine, case)
        alike(engine)


class Branching(Regression):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out + self.unused(x[:, :5]) if torch.distributed.get_rank() == 1 else out


def refreshed() -> None:
    """Master weights made anew from parameters, in the middle of a window, do not have the offset."""
    for name in ("ZeRO-0 bf16", "BF16_Optimizer"):
        for block in (PAST, NOISE):
            case = case_of(name, block, accumulation=2)
            engine = build(case)
            train(engine, case, 0, 2)
            theta = weights_of(engine)
            engine.backward(loss_of(engine, 2, 0, rank(), case))
            engine.step()
            assert not equal(weights_of(engine), theta)
            engine.optimizer.refresh_fp32_params()
            assert equal(weights_of(engine), theta)
            engine.backward(loss_of(engine, 2, 1, rank(), case))
            engine.step()
            alike(engine)


def updated() -> None:
    """BF16_Optimizer's parameters made anew from master weights, in the middle of a window: the offset does
    not come back with them. A step does the same and keeps the gradient of the next offset.
    """
    case = case_of("BF16_Optimizer", PAST, accumulation=2)
    engine = build(case)
    train(engine, case, 0, 2)
    assert engine.optimizer.gradmix.weights.phase.name == "READY"
    engine.backward(loss_of(engine, 2, 0, rank(), case))
    engine.step()
    for flat in engine.optimizer.fp32_groups_flat_partition:
        flat.data.fill_(0.5)
    engine.optimizer.update_lp_params()
    assert all((w == 0.5).all() for n, w in weights_of(engine).items() if not n.startswith("frozen"))
    engine.backward(loss_of(engine, 2, 1, rank(), case))
    assert all((w == 0.5).all() for n, w in weights_of(engine).items() if not n.startswith("frozen"))


def without_backward() -> None:
    """A step that no backward came before, after a training forward."""
    for name in ("ZeRO-0", "ZeRO-0 bf16"):  # BF16_Optimizer fails then, without us
        for block in (PAST, NOISE):
            case = case_of(name, block)
            engine = build(case)
            steps(engine, case, 0, 2)
            loss_of(engine, 2, 0, rank(), case)
            engine.step()
            alike(engine)
            if name == "ZeRO-0 bf16":
                optimizer = engine.optimizer
                for masters, params in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(masters, params, strict=True))
            engine.train()
            steps(engine, case, 3, 4)
            alike(engine)


def fused_optimizers() -> None:
    """FP16_Optimizer, whose parameters are views of a flat tensor, and in its legacy way are made anew."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    for block in (GAF, {**GAF, **SMOOTH}, PAST, NOISE):
        found = []
        for legacy in (False, True, None):
            model = Regression()
            case = Case(block, stage=0, dtype="bf16")
            params = [p for p in model.parameters() if p.requires_grad]
            kind = torch.optim.SGD if legacy is None else fused_descent()
            optimizer = {"type": "Adam", "params": {"lr": LR}, "legacy_fusion": bool(legacy)}
            config = {"bf16": {"enabled": True}, "optimizer": optimizer}
            engine = initialize(model, kind(params, lr=LR), block, config)
            assert isinstance(engine.optimizer, FP16_Optimizer) == (legacy is not None)
            if legacy is not None:
                assert engine.optimizer.fused_adam_legacy == legacy
            found.append(steps(engine, case))
            alike(engine)
        assert equal(found[0], found[2]) and equal(found[1], found[2]), block


def twice() -> None:
    """Two engines in one process, in turns; and one optimizer given to a second engine."""
    case = case_of("ZeRO-0", ALL)
    expected = steps(build(case), case)
    engines = [build(case), build(case_of("ZeRO-0", None)), build(case)]
    for step in range(4):
        for engine in engines:
            steps(engine, case, step, step + 1)
    assert equal(weights_of(engines[0]), expected) and equal(weights_of(engines[2]), expected)
    model = Regression()
    optimizer = sgd(model)
    steps(initialize(model, optimizer, GAF), case)
    fresh, state = Regression(), optimizer.state
    model.load_state_dict(fresh.state_dict())
    state.clear()
    engine = initialize(model, optimizer, {**GAF, **SMOOTH, **TINY})
    told = steps(engine, case)
    assert engine.optimizer.gradmix.momentum.steps == 4
    other = case_of("ZeRO-0", {**GAF, **SMOOTH, **TINY})
    assert equal(told, steps(build(other), other))


def copied() -> None:
    """The optimizer of an engine can be pickled and copied, and the copy is an ordinary one."""
    engine = build(case_of("ZeRO-0", ALL))
    for other in (pickle.loads(pickle.dumps(engine.optimizer)), copy.deepcopy(engine.optimizer)):
        assert not hasattr(other, "gradmix") and type(other) is torch.optim.SGD
        other.step()


def with_closure() -> None:
    """A closure is the wrapped optimizer's affair."""
    case = case_of("ZeRO-0", GAF)
    engine = build(case)
    engine.backward(loss_of(engine, 0, 0, rank(), case))
    assert engine.optimizer.step(lambda: torch.tensor(3.0)) == 3.0


class Sparse(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(7, 3, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table(torch.arange(4)) * 1.0


def sparse() -> None:
    engine = build(case_of("ZeRO-0", GAF), Sparse())
    with pytest.raises(ValueError, match=r"table.weight: its gradient is sparse"):
        steps(engine, case_of("ZeRO-0", GAF))


def thawed() -> None:
    """Frozen when the engine was built, and trained later: the rules do not know it."""
    for block in (GAF, past(lr=0.1)):
        engine = build(case_of("ZeRO-0", block))
        case = case_of("ZeRO-0", block)
        steps(engine, case, 0, 1)
        engine.module.frozen.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"frozen.weight: .*when the engine was built"):
            steps(engine, case, 1, 2)


def frozen_later() -> None:
    """Trained when the engine was built, and frozen later."""
    for block in (GAF, GAF_MODEL, ALL, NOISE):
        case = case_of("ZeRO-0", block)
        engine = build(case)
        steps(engine, case, 0, 2)
        engine.module.second.requires_grad_(False)
        before = weights_of(engine)
        after = steps(engine, case, 2, 4)
        assert np.array_equal(before["second.weight"], after["second.weight"])
        assert not np.array_equal(before["first.weight"], after["first.weight"])
        alike(engine)


def at_once() -> None:
    """BF16_Optimizer that takes over each gradient as soon as it is there."""
    found = []
    for immediate in (False, True):
        case = case_of("BF16_Optimizer", ALL, accumulation=2)
        case.config["bf16"] = {"enabled": True, "immediate_grad_update": immediate}
        case = Case(**{**case.__dict__, "dtype": "bf16"})
        found.append(train(build(case), case)["weights"])
    assert equal(*found)


def differing() -> None:
    """Ranks that are not at the same point, or train different parameters: a message, not a hang."""
    from ds_gradmix.comm.consistency import MismatchError

    for name in KINDS:
        case = case_of(name, ALL)
        engine = build(case)
        steps(engine, case, 0, 1)
        with pytest.raises(MismatchError, match="rank 1 has nothing where rank 0 has"):
            if rank() == 0:
                engine.backward(loss_of(engine, 1, 0, rank(), case))
            engine.step()
    engine = build(case := case_of("ZeRO-0", GAF))
    engine.module.first.requires_grad_(rank() == 0)
    with pytest.raises(MismatchError, match=r"where rank 0 has first\.weight"):
        steps(engine, case)


def engines_share_groups() -> None:
    """A second engine makes no process group that the first one has made."""
    numbers = []
    for worker in ("rank", 2, 2, "rank"):
        build(case_of("ZeRO-0", {**GAF, "worker": worker}))
        numbers.append(len(torch.distributed.distributed_c10d._world.pg_map))
    assert numbers[1:] == [numbers[1]] * 3, numbers


def checkpoints() -> None:
    """Each rank's state in the checkpoint's folder, by tag or not; what is not there is warned about."""
    folders = [Path(tempfile.mkdtemp()) if rank() == 0 else Path()]
    torch.distributed.broadcast_object_list(folders)
    for name in KINDS:
        _checkpoints_of(name, folders[0] / name)
    torch.distributed.barrier()  # the other rank may still be loading
    if rank() == 0:
        shutil.rmtree(folders[0])


def nowhere() -> None:
    """A checkpoint without a folder is DeepSpeed's error, and leaves nothing behind."""
    for name in KINDS:
        engine = build(case_of(name, {**GAF, **SMOOTH}))
        for save_dir in (None, ""):
            with pytest.raises(ValueError, match="save_dir must be a non-empty string"):
                engine.save_checkpoint(save_dir)
        assert not Path("global_step0").exists()


def _checkpoints_of(name: str, folder: Path) -> None:
    case, plain, momentum = (case_of(name, block) for block in (ALL, None, {**GAF, **SMOOTH}))
    engine = build(case)
    steps(engine, case, 0, 1)
    engine.save_checkpoint(str(folder), tag="first")
    steps(engine, case, 1, 2)
    engine.load_checkpoint(str(folder / "empty"))  # nothing to load, and nothing lost
    engine.save_checkpoint(str(folder))
    latest = {f"{folder}/first", f"{folder}/global_step2"}
    for place in latest:
        assert [p.name for p in sorted(Path(place).glob("gradmix*"))] == [
            f"gradmix_rank_0000{i}.pt" for i in range(2)
        ]
    whole = steps(engine, case, 2, 4)
    for options, first in (({"tag": "first"}, 1), ({}, 2), ({"tag": "global_step2"}, 2)):
        loss_of(engine, 9, 0, rank(), case)  # away from theta
        with log_lines() as lines:
            engine.load_checkpoint(str(folder), **options)
        assert equal(steps(engine, case, first, 4), whole) and not lines, (name, options, lines)
    with log_lines() as lines:
        build(case_of(name, {**ALL, "worker": 2})).load_checkpoint(str(folder), tag="first")
    told = [line for line in lines if "active over" not in line]
    assert len(told) == (rank() == 0) and all("of workers of another size" in line for line in told), lines
    other = build(momentum)
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        for resumed, kind, warned in ((engine, case, 1), (other, momentum, 0)):
            with log_lines() as lines:
                resumed.load_checkpoint(str(folder), **options)
            assert len(lines) == (warned if rank() == 0 else 0), (name, options, lines)
            assert np.isfinite(steps(resumed, kind, 2, 3)["scale"]).all()
    engine = build(plain)
    steps(engine, plain, 0, 3)
    engine.save_checkpoint(str(folder), tag="first")  # over that of a run with a block
    torch.distributed.barrier()  # a rank reads the files of all
    with log_lines() as lines:
        build(case).load_checkpoint(str(folder), tag="first")
    told = [line for line in lines if "active over" not in line]
    assert len(told) == (rank() == 0) and all("of another step" in line for line in told), (name, lines)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        schedulers,
        outside,
        strided,
        mixed,
        tied,
        windows,
        unused_on_some,
        refreshed,
        updated,
        without_backward,
        fused_optimizers,
        twice,
        copied,
        with_closure,
        sparse,
        thawed,
        frozen_later,
        at_once,
        differing,
        checkpoints,
        nowhere,
        engines_share_groups,
    )
}


@cache
def checked() -> list[dict[str, str | None]]:
    return run_ranks(2, failures, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str) -> None:
    for failed in checked():
        assert failed[name] is None, failed[name]


def test_momentum_of_a_bucket_that_appears_later() -> None:
    """A layer was frozen, say: its bucket is another one, whose mean has no history to be corrected for."""
    from ds_gradmix.exchange.factor_momentum import FactorMomentum
    from ds_gradmix.exchange.plan import Piece

    smoothing = FactorMomentum(0.9, 0.1, [], torch.device("cpu"))
    for group, steps in ((0, 3), (1, 2)):
        smoothing.reserve(group, 4)
        piece = Piece(0, 4, 0, 0, group, 0)
        for _ in range(steps):
            smoothing.begin([piece])
            smoothed = smoothing.apply([piece], torch.full((4,), 0.5))
            torch.testing.assert_close(smoothed, torch.full((4,), 0.5))
            smoothing.commit()
