"""One training run of W workers in one process, by the rules of a gradmix block and a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gradmix_pretrain.faults import GRADIENT_KINDS, Fault, GradientFault, Training, parse_fault
from gradmix_pretrain.schedule import cosine_with_warmup
from torch import Tensor

from benchmarks.evidence.tasks import Digits, Problem, Text
from ds_gradmix.combine import CombineState, combine
from ds_gradmix.config import parse_block
from ds_gradmix.optim import Lamb, Lars
from ds_gradmix.rules import Extrapolation, RngKey

OPTIMIZERS: Mapping[str, Any] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD without decay": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "AdamW": partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1),
    "LAMB": partial(Lamb, weight_decay=0.01),
    "LARS": partial(Lars, momentum=0.9, weight_decay=0.0005),
}


@dataclass(frozen=True)
class Run:
    """Everything that a run depends on, but for its learning rate and seed.

    Attributes:
        task: what is learned.
        block: the gradmix block; the plain mean if empty.
        optimizer: a name of OPTIMIZERS.
        steps: how many.
        faults: as `launch/pretrain.py --fault` has them, a rank for each worker.
        clipping: gradient clipping by the norm of the combined gradient; 0 for none.
        warmup_steps: of a cosine that falls to a tenth; 0 for a constant learning rate.
        evaluations: how often it is evaluated, evenly over the run, the end included.
        by_deepspeed: whether deepspeed_training.py trains it instead, by the `deepspeed` command.
    """

    task: Digits | Text
    block: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "SGD"
    steps: int = 100
    faults: tuple[str, ...] = ()
    clipping: float = 0.0
    warmup_steps: int = 0
    evaluations: int = 10
    by_deepspeed: bool = False


def train(run: Run, lr: float, seed: int, skip_share: float = 0.0) -> dict[str, Any]:
    """Train, and return the held-out measure over the run, and in how many steps nothing was updated.

    A run whose weights cease to be finite ends there; its measure is None from then on. `skip_share` of the
    steps, drawn at random, are left out.
    """
    return _Training(run, lr, seed, skip_share).run()


def parsed_faults(texts: Iterable[str], steps: int, workers: int) -> tuple[Fault, ...]:
    """Faults from their command-line form; ValueError for one that makes no sense here."""
    return tuple(parse_fault(text, Training(steps, workers)) for text in texts)


class _Training:
    def __init__(self, run: Run, lr: float, seed: int, skip_share: float) -> None:
        self.settings, self.lr, self.seed, self.skip_share = run, lr, seed, skip_share
        workers = run.task.workers
        faults = parsed_faults(run.faults, run.steps, workers)
        self.problem: Problem = run.task.problem(
            seed, tuple(f for f in faults if f.kind not in GRADIENT_KINDS)
        )
        self.gradient_faults = [GradientFault(f, seed, 1) for f in faults if f.kind in GRADIENT_KINDS]
        self.config = parse_block({"seed": seed, **run.block})
        self.theta = Weights(self.problem.module)
        self.optimizer = OPTIMIZERS[run.optimizer](self.theta.parameters, lr=lr)
        self.state: CombineState | None = None
        self.past_WN: Tensor | None = None
        self.weight_sum_W = torch.zeros(workers)

    def run(self) -> dict[str, Any]:
        run, skipped, curve = self.settings, 0, []
        random = np.random.default_rng((2, self.seed))
        marks = {round(run.steps * (i + 1) / run.evaluations) for i in range(run.evaluations)}
        for step in range(run.steps):
            left_out = random.random() < self.skip_share
            skipped += not self._step(step, left_out)
            if step + 1 in marks:
                curve.append(self._evaluate())
                if curve[-1] is None:
                    curve += [None] * (run.evaluations - len(curve))
                    break
        weights = [round(weight, 4) for weight in (self.weight_sum_W / run.steps).tolist()]
        found = {"curve": curve, "skipped": skipped, "weights": weights}
        learned = self.problem.learned(self.theta.views(self.theta.values_N))
        return found if learned is None else {**found, "learned": round(learned, 4)}

    def _step(self, step: int, left_out: bool) -> bool:
        """Take a step, counted from 0; whether the weights were updated."""
        lr = self.lr
        if self.settings.warmup_steps:
            lr *= cosine_with_warmup(step, self.settings.warmup_steps, self.settings.steps, 0.1)
        grads_WN = self._gradients(step, lr)
        combined_N, info = combine(grads_WN, self.config, step, self.theta.sizes, self.state)
        if info["skipped"] or left_out:
            return False
        self.state, self.past_WN = info["state"], grads_WN
        weights_W = info["weights"] if info["weights"].ndim == 1 else info["weights"].mean(0)
        self.weight_sum_W += weights_W
        if self.settings.clipping:
            norm = combined_N.norm()
            combined_N = combined_N * (self.settings.clipping / (norm + 1e-6)).clamp(max=1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.theta.set_gradients(combined_N)
        self.optimizer.step()
        return True

    def _gradients(self, step: int, lr: float) -> Tensor:
        """All workers' gradients `[W, N]`, each taken at its own point, those of bad workers replaced."""
        batch, rule = self.problem.batch(step), self.config.extrapolation
        points_WN = self.theta.values_N.expand(self.settings.task.workers, -1)
        offsets_WN = None if rule is None else self._offsets(rule, step, lr)
        points_WN = (points_WN if offsets_WN is None else points_WN + offsets_WN).clone().requires_grad_()
        losses_W = self.problem.losses(self.theta.views(points_WN), batch)
        (grads_WN,) = torch.autograd.grad(losses_W.sum(), points_WN)
        for fault in self.gradient_faults:
            fault.begin(step + 1)
            row_N = grads_WN[fault.fault.rank]
            for index, part in enumerate(row_N.split(self.theta.sizes)):
                if (replacement := fault.replaced(index, part.clone())) is not None:
                    part.copy_(replacement)
        return grads_WN

    def _offsets(self, rule: Extrapolation, step: int, lr: float) -> Tensor | None:
        """Every worker's offset, `[W, N]`; None where there is none yet."""
        if rule.needs_gradient and self.past_WN is None:
            return None
        offsets = []
        theta_N, sizes = self.theta.values_N, self.theta.sizes
        for worker in range(self.settings.task.workers):
            past_N = torch.zeros_like(theta_N) if self.past_WN is None else self.past_WN[worker]
            state = int(RngKey(self.seed, step).generator(worker).integers(2**62))
            direction_N = rule.direction(past_N, torch.Generator().manual_seed(state))
            scale = rule.scale(lr)
            if scale is None:
                scales_P = rule.scales(_norms(theta_N, sizes), _norms(past_N, sizes), torch.tensor(sizes), lr)
                offsets.append(direction_N * scales_P.repeat_interleave(torch.tensor(sizes)))
            else:
                offsets.append(direction_N * scale)
        return torch.stack(offsets)

    def _evaluate(self) -> float | None:
        """The held-out measure; None if weights are not finite."""
        if not self.theta.values_N.isfinite().all():
            return None
        with torch.no_grad():
            value = self.problem.evaluate(self.theta.views(self.theta.values_N))
        return round(value, 5) if math.isfinite(value) else None


class Weights:
    """The weights of a module as one flat tensor, which the optimizer's parameters are views of."""

    def __init__(self, module: torch.nn.Module) -> None:
        named = {name: p.detach() for name, p in module.named_parameters()}
        self.shapes = {name: p.shape for name, p in named.items()}
        self.sizes = [p.numel() for p in named.values()]
        self.values_N = torch.cat([p.reshape(-1) for p in named.values()])
        self.parameters = [torch.nn.Parameter(view) for view in self.views(self.values_N).values()]

    def views(self, flat_N: Tensor) -> dict[str, Tensor]:
        """A flat tensor's parts in the shapes of the parameters, by name; dimensions before N stay."""
        parts = zip(flat_N.split(self.sizes, dim=-1), self.shapes.items(), strict=True)
        return {name: part.unflatten(-1, shape) for part, (name, shape) in parts}

    def set_gradients(self, gradient_N: Tensor) -> None:
        for parameter, part in zip(self.parameters, self.views(gradient_N).values(), strict=True):
            parameter.grad = part


def _norms(flat_N: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.norm() for part in flat_N.split(sizes)])
