"""Training with workers whose gradients are wrong from a step on, under DeepSpeed and replayed in float64.

A fault is a loss of its own, so that DeepSpeed and the replay take it by the same way: the negative loss,
1000 times the loss, or the inner product of the parameters with a vector, whose gradient is that vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tests.support.reference import Array, guard_decision, guard_observation

LR, BATCH = 0.05, 16


@dataclass(frozen=True)
class Fault:
    """What a worker does in some steps: from the first on, and before the second."""

    worker: int
    kind: str
    begin: int = 6
    end: int = 10**9

    def active(self, step: int, worker: int) -> bool:
        return worker == self.worker and self.begin <= step < self.end


@dataclass(frozen=True)
class Run:
    """One training run; `params` are Guard's, None for the plain mean."""

    faults: tuple[Fault, ...] = ()
    params: dict[str, Any] | None = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)  # of the block
    stage: int = 2
    accumulation: int = 1
    steps: int = 24
    config: dict[str, Any] = field(default_factory=dict)
    resume_at: int | None = None
    seed: int = 0

    @property
    def block(self) -> dict[str, Any]:
        mixing: dict[str, Any] = {"type": "Mean"}
        if self.params is not None:
            mixing = {"type": "Guard", "params": self.params}
        return {"mixing": mixing, **self.keys}

    @property
    def ds_config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**6,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage},
            **self.config,
            "gradmix": self.block,
        }


def new_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def loss_of(model: Any, parameters: Sequence[torch.Tensor], run: Run, at: tuple[int, int, int]) -> Any:
    """The loss of a worker's batch at a step and micro-step."""
    step, micro, worker = at
    random = torch.Generator().manual_seed(10**6 * run.seed + 10_000 * step + 100 * micro + worker)
    x = torch.randn(BATCH, 6, generator=random, dtype=torch.float64)
    wanted = torch.stack([x[:, :3].sum(1), x[:, 3] * x[:, 4], x[:, 5].sin()], dim=1) + 1
    kind = next((fault.kind for fault in run.faults if fault.active(step, worker)), "none")
    if kind == "duplicate":  # the data of the next worker
        return loss_of(model, parameters, replace(run, faults=()), (step, micro, worker + 1))
    if kind == "shuffled":
        wanted = wanted[torch.randperm(BATCH, generator=random)] * torch.tensor([1.0, -1.0, 1.0])
    dtype = parameters[0].dtype
    loss = ((model(x.to(dtype)).to(torch.float64) - wanted) ** 2).mean()
    if kind.startswith("noise") or kind == "stuck":
        length = float(kind.removeprefix("noise") or 1) if kind != "stuck" else 1.0
        if kind == "stuck":
            random = torch.Generator().manual_seed(7)
        loss = loss * 0
        for p in parameters:
            direction = torch.randn(p.shape, generator=random, dtype=torch.float64)
            loss = loss + (p.to(torch.float64) * direction).sum() * length
    factors = {"negative": -1.0, "scaled": 1000.0, "nan": math.nan, "zero": 0.0}
    return loss * factors.get(kind, 1.0)


def train(run: Run, folder: str) -> dict[str, Any]:
    """On a rank: train; the weights, and what was told of each step."""
    import deepspeed

    import ds_gradmix
    from ds_gradmix.engines.install import reducer_of
    from tests.support.engines import log_lines
    from tests.support.training import weights_of

    ds_gradmix.enable()

    def build() -> Any:
        model = new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=run.ds_config)[0]

    told: list[dict[str, float]] = []
    with log_lines() as lines:
        engine = build()
        for step in range(run.steps):
            if step == run.resume_at:
                engine.save_checkpoint(folder, tag="guard")
                engine = build()
                assert engine.load_checkpoint(folder, tag="guard")[0] is not None
            for micro in range(run.accumulation):
                at = (step, micro, torch.distributed.get_rank())
                engine.backward(loss_of(engine, list(engine.module.parameters()), run, at))
                engine.step()
            told.append(ds_gradmix.stats(engine))
    reducer = reducer_of(engine)
    states = [] if reducer is None else [state.values_KW.tolist() for state in reducer.state.mixing]
    return {"weights": weights_of(engine), "stats": told, "lines": list(lines), "states": states}


@dataclass
class Replayed:
    """What the replay comes to: the weights, and at each step its measures."""

    weights: dict[str, Array]
    kept: list[list[bool]]
    state: tuple[Array, int]
    grams: list[Array]  # of the step's gradients of a mean loss, averaged over its reductions


def replay(run: Run, num_workers: int) -> Replayed:
    """The same in one process, by loops in float64."""
    model = new_model().double()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=LR, momentum=0.5)
    e, count, kept, grams = np.zeros(num_workers), 0, [], []
    drops = run.keys.get("nonfinite") == "drop"
    for step in range(run.steps):
        every = range(run.accumulation)
        reductions = [[micro] for micro in every] if run.stage == 2 else [[*every]]
        total = {name: np.zeros(p.numel()) for name, p in named.items()}
        gram, keeps = np.zeros((num_workers, num_workers)), np.ones(num_workers, dtype=bool)
        for micros in reductions:
            workers = []
            for worker in range(num_workers):
                model.zero_grad()
                for micro in micros:
                    loss = loss_of(model, list(named.values()), run, (step, micro, worker))
                    (loss / run.accumulation).backward()
                workers.append({n: p.grad.reshape(-1).numpy().copy() for n, p in named.items()})  # type: ignore[union-attr]
            present = np.array([all(np.isfinite(g).all() for g in w.values()) for w in workers])
            for worker in np.flatnonzero(~present) if drops else ():
                workers[worker] = {name: np.zeros_like(g) for name, g in workers[worker].items()}
            present = present if drops else np.ones_like(present)
            flat = np.stack([np.concatenate([w[n] for n in named]) for w in workers])
            gram += flat @ flat.T
            segments = [[n] for n in named] if run.keys.get("scope") == "parameter" else [list(named)]
            for names in segments:
                rows = np.stack([np.concatenate([w[n] for n in names]) for w in workers])
                norms = [math.sqrt(float(row @ row)) for row in rows]
                weights = np.full(num_workers, 1 / num_workers)
                if run.params is not None:
                    weights = guard_decision(norms, present, e, count, run.params)
                keeps &= weights > 0
                begin = 0
                for n in names:
                    size = total[n].size
                    total[n] += weights @ rows[:, begin : begin + size]
                    begin += size
        for name, p in named.items():
            p.grad = torch.from_numpy(total[name]).view_as(p).clone()
        if all(np.isfinite(value).all() for value in total.values()):
            optimizer.step()
            e, count = guard_observation(gram, e, count, (run.params or {}).get("smoothing", 0.9))
        kept.append(keeps.tolist())
        grams.append(gram * len(reductions))
    found = {n: p.detach().numpy() for n, p in named.items()}
    return Replayed(found, kept, (e, count), grams)
