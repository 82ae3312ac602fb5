"""A fault's gradients are what DeepSpeed reduces, by every way it has, at every micro-step."""

from __future__ import annotations

from typing import Any

import torch
from gradmix_pretrain.faults import Drill, Training, parse_fault
from torch import Tensor

from tests.support.engines import ENGINES
from tests.support.models import Regression, numbers
from tests.support.ranks import run_ranks
from tests.support.training import Case, build

STEPS, ACCUMULATION = 3, 2
EVERY = {**ENGINES, "ZeRO-3": {"stage": 3}}


def trained(case: Case, faults: list[str], factors: dict[int, float]) -> list[Tensor]:
    """What the model predicts after each step; rank 1's loss is multiplied by the step's factor."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    model = Regression()
    del model.empty  # ZeRO-3 cannot gather it
    engine = build(case, model)
    rank = torch.distributed.get_rank()
    drill = Drill([parse_fault(text, Training(STEPS, 2)) for text in faults], rank)
    drill.attach(engine.module, 7, ACCUMULATION)
    found = []
    for step in range(1, STEPS + 1):
        drill.begin(step)
        for micro_step in range(ACCUMULATION):
            x, target = (values.to(dtype) for values in numbers(step, micro_step, rank))
            loss = (engine(x) - target).square().mean()
            engine.backward(loss * (factors.get(step, 1.0) if rank == 1 else 1.0))
            engine.step()
        with torch.no_grad():
            found.append(engine(numbers(0, 0, 0)[0].to(dtype)))
    engine.destroy()
    return found


def compare(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """By faults, and by a loss multiplied by what they multiply gradients by."""
    case = Case(None, accumulation=ACCUMULATION, **EVERY[name])
    faults = ["negative:rank=1:from=2:until=2", "scale:rank=1:from=3:scale=4"]
    return trained(case, faults, {}), trained(case, [], {2: -1.0, 3: 4.0})


def on_a_rank() -> tuple[dict[str, Any], list[Tensor]]:
    """Every engine's results, and those without a fault."""
    return {name: compare(name) for name in EVERY}, trained(Case(None, accumulation=ACCUMULATION), [], {})


def test_what_is_reduced_is_faulty() -> None:
    for results, plain in run_ranks(2, on_a_rank):
        for name, (faulty, expected) in results.items():
            # Signs and powers of two are exact, so the same bits.
            assert all(map(torch.equal, faulty, expected)), name
        unlike = [not torch.equal(*pair) for pair in zip(results["ZeRO-2"][0], plain, strict=True)]
        assert unlike == [False, True, True]
