"""Faults of drills: what may be typed, and what each kind does to gradients and to data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from gradmix_pretrain.faults import KINDS, Drill, GradientFault, Training, parse_fault, with_faults
from gradmix_pretrain.tokens import TrainingWindows

SEED, STEPS, LENGTH = 7, 40, 16
FOUR = Training(STEPS, 4)
BY_TENSOR, BY_STAGE = Training(STEPS, 4, tensor_parallel=2), Training(STEPS, 4, pipeline_stages=2)


def test_what_is_typed_is_read() -> None:
    noise = parse_fault("noise:scale=100:from=5:rank=3:until=9", FOUR)
    assert (noise.kind, noise.rank, noise.scale) == ("noise", 3, 100.0)
    assert [step for step in range(1, STEPS + 1) if noise.active(step)] == [5, 6, 7, 8, 9]
    assert parse_fault("negative:rank=0:from=2", FOUR).active(10**9)
    assert parse_fault("scale:rank=0:from=1", FOUR).scale == 1000.0
    duplicates = ("duplicate:rank=3:from=1", "duplicate:rank=3:from=1:of=2")
    assert [parse_fault(text, FOUR).read_replica for text in duplicates] == [0, 2]


@pytest.mark.parametrize(
    ("text", "training", "allowed"),
    [
        ("negativ:rank=1:from=1", FOUR, ": kinds are noise, negative, .*, duplicate$"),
        ("negative", FOUR, "takes rank=R:from=STEP, optionally until, each once"),
        ("negative:rank=1:from=1:scale=2", FOUR, "optionally until, each once"),
        ("noise:rank=1:from=1:of=2", FOUR, "optionally until, scale, each once"),
        ("negative:rank=1:from=1:rank=2", FOUR, "each once"),
        ("negative:rank=1:from=1:", FOUR, "each once"),
        ("negative:rank=4:from=1", FOUR, "rank is a whole number, one of 0 to 3"),
        ("negative:rank=-1:from=1", FOUR, "one of 0 to 3"),
        ("negative:rank=1:from=0", FOUR, "from is a whole number, one of 1 to 40"),
        ("negative:rank=1:from=41", FOUR, "one of 1 to 40"),
        ("negative:rank=1:from=5:until=4", FOUR, "until is a whole number, 5 or more"),
        ("negative:rank=1:from=5:until=", FOUR, "until is a whole number"),
        ("noise:rank=1:from=1:scale=nan", FOUR, "scale is a number above 0"),
        ("scale:rank=1:from=1:scale=-1", FOUR, "scale is a number above 0"),
        ("noise:rank=1:from=1:scale=much", FOUR, "scale is a number above 0"),
        ("duplicate:rank=1:from=1:of=1", FOUR, "another replica than rank 1's.* there are 4"),
        ("duplicate:rank=2:from=1:of=3", BY_TENSOR, "another replica"),
        ("duplicate:rank=0:from=1", Training(STEPS, 1), "there must be one; there are 1"),
        ("negative:rank=1:from=1", BY_TENSOR, "kinds are shuffled, tokens, duplicate"),
        ("stale:rank=1:from=1", Training(STEPS, 4, fp16=True), "take another kind, or bf16"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(text: str, training: Training, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed) as mistake:
        parse_fault(text, training)
    assert str(mistake.value).startswith(f"--fault {text}: ") and "\n" not in str(mistake.value)


def test_replicas_are_those_of_deepspeed() -> None:
    topology = PipeDataParallelTopology(2, 2)
    assert [BY_STAGE.replica(rank) for rank in range(4)] == [topology.get_coord(r).data for r in range(4)]
    assert [BY_TENSOR.replica(rank) for rank in range(4)] == [0, 0, 1, 1]


def gradients(text: str, steps: range, accumulation_steps: int = 1, seed: int = SEED) -> list[torch.Tensor]:
    """A parameter's gradients; without the fault, that of micro-step m of step s is (s + m/100) X."""
    weight = torch.nn.Parameter(torch.zeros(64))
    fault = GradientFault(parse_fault(text, FOUR), seed, accumulation_steps)
    fault.attach([weight, torch.nn.Parameter(torch.zeros(2), requires_grad=False)])
    found = []
    for step in steps:
        weight.grad = None
        fault.begin(step)
        for micro_step in range(accumulation_steps):
            ((step + micro_step / 100) / accumulation_steps * X * weight).sum().backward()
        assert weight.grad is not None
        found.append(weight.grad)
    return found


X = torch.arange(-20.0, 44.0)  # whole numbers, so that products are exact


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("negative", [1, 2, -3, -4, 5, 6]),
        ("zero", [1, 2, 0, 0, 5, 6]),
        ("scale", [1, 2, 3000, 4000, 5, 6]),
        ("stuck", [1, 2, 3, 3, 5, 6]),
        ("stale", [1, 2, 2, 3, 5, 6]),
    ],
)
def test_gradients_of_faulty_steps_are_replaced(kind: str, factors: list[int]) -> None:
    for factor, grad in zip(factors, gradients(f"{kind}:rank=0:from=3:until=4", range(1, 7)), strict=True):
        assert torch.equal(grad, factor * X)


@pytest.mark.parametrize(("kind", "step"), [("stuck", 3), ("stale", 5)])
def test_kept_gradients_are_means_over_micro_steps(kind: str, step: int) -> None:
    last = gradients(f"{kind}:rank=0:from=3", range(1, 7), accumulation_steps=3)[-1]
    torch.testing.assert_close(last, (step + 0.01) * X)


def test_memory_begins_afresh_when_resumed() -> None:
    for kind, factors in {"stuck": [5, 5, 5], "stale": [5, 5, 6]}.items():
        found = gradients(f"{kind}:rank=0:from=3", range(5, 8))
        assert [round(float(grad[-1] / X[-1])) for grad in found] == factors


def test_memory_is_let_go_of() -> None:
    fault = GradientFault(parse_fault("stuck:rank=0:from=1:until=2", FOUR), SEED, 1)
    weight = torch.nn.Parameter(torch.ones(3))
    fault.attach([weight])
    for step in range(1, 5):
        fault.begin(step)
        weight.sum().backward()
    assert not fault._recorded and not fault._returned


def test_nan_and_noise() -> None:
    good, bad, after = gradients("nan:rank=0:from=2:until=2", range(1, 4))
    assert good.isfinite().all() and bad.isnan().all() and after.isfinite().all()

    text = "noise:rank=0:from=2:scale=100"
    _, second, third = gradients(text, range(1, 4))
    torch.testing.assert_close(second.norm(), 100 * (2 * X).norm())
    # Of 64 coordinates: 4 standard deviations from no correlation.
    assert abs(torch.cosine_similarity(second, X, dim=0)) < 0.5
    assert abs(torch.cosine_similarity(second, third, dim=0)) < 0.5
    assert torch.equal(third, gradients(text, range(3, 4))[0]), "as in a resumed run"
    for other in (
        gradients(text, range(3, 4), seed=8),
        gradients(text.replace("rank=0", "rank=1"), range(3, 4)),
    ):
        assert not torch.equal(third, other[0])
    micro = gradients(text, range(2, 3), accumulation_steps=4)[0]
    assert micro.norm() < 0.8 * second.norm(), "each micro-step has its own draw"


def test_noise_keeps_dtype() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    fault = GradientFault(parse_fault("noise:rank=0:from=1", FOUR), SEED, 1)
    fault.attach([weight])
    fault.begin(1)
    weight.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert float(weight.grad.float().norm()) == pytest.approx(8**0.5, rel=0.01)  # bf16 has 8 bits


def windows(rank: int, *texts: str, training: Training = FOUR) -> TrainingWindows:
    tokens_N = np.arange(72 * LENGTH, dtype=np.uint16)
    of_rank = TrainingWindows(tokens_N, LENGTH, 2, 2, rank, training.num_replicas, SEED)
    return with_faults(of_rank, [parse_fault(text, training) for text in texts], vocab_size=300)


def test_data_of_faulty_steps_is_replaced() -> None:
    clean = windows(1)
    for kind in ("shuffled", "tokens", "duplicate"):
        faulty = windows(1, f"{kind}:rank=1:from=2:until=2")
        for step, micro_step in ((0, 0), (0, 1), (2, 0)):
            assert torch.equal(faulty.batch(step, micro_step), clean.batch(step, micro_step))
        found, expected = faulty.batch(1, 1), clean.batch(1, 1)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert not torch.equal(found, expected)
        assert torch.equal(found, windows(1, f"{kind}:rank=1:from=2:until=2").batch(1, 1)), "reproducible"
        if kind == "shuffled":
            assert torch.equal(found.flatten().sort()[0], expected.flatten().sort()[0])
        elif kind == "tokens":
            assert found.min() >= 0 and found.max() < 300 and found.unique().numel() > 20
            assert not torch.equal(found, faulty.batch(1, 0))
        else:
            assert torch.equal(found, windows(2).batch(1, 1))
            assert torch.equal(windows(1, f"{kind}:rank=1:from=1:of=3").batch(1, 1), windows(3).batch(1, 1))


def test_all_ranks_of_a_replica_and_no_others_read_the_wrong_data() -> None:
    for training in (BY_TENSOR, BY_STAGE):
        for rank in range(4):
            text, replica = f"tokens:rank={rank}:from=1", training.replica(rank)
            good, bad = (windows(i, text, training=training).batch(0, 0) for i in (1 - replica, replica))
            assert torch.equal(good, windows(1 - replica, training=training).batch(0, 0))
            assert not torch.equal(bad, windows(replica, training=training).batch(0, 0))


def test_rank_0_says_when_and_the_faulty_rank_has_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    faults = [parse_fault(f"{kind}:rank=1:from=2:until=3", FOUR) for kind in KINDS]
    for rank in range(3):
        model = torch.nn.Linear(2, 2)
        drill = Drill(faults, rank)
        drill.attach(model, SEED, 1)
        assert bool(model.weight._backward_hooks) == (rank == 1)
        for step in range(1, 6):
            drill.begin(step)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (2 * len(KINDS) if rank == 0 else 0)
        if said:
            assert said[0] == "step 2: fault noise:rank=1:from=2:until=3 begins"
            assert said[-1] == "step 4: fault duplicate:rank=1:from=2:until=3 has ended"
