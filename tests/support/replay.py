"""The training of training.py once more in one process, float64, from the reference of the rules alone.

A regression's replay follows DeepSpeed in what was reduced together, by what the ranks say their buckets
held; the language model's decides by parameter, so what lies in which bucket does not matter. Experts that
are spread over ranks have fewer workers, each the sum over ranks that share them. Where the block makes
several replicas one worker, its gradient is their mean.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tests.support import models
from tests.support.layouts import Layout
from tests.support.reference import Array, gaf_weights, philox, sketch, vrgd
from tests.support.training import LR, Case, groups_of, loss_of
from tests.support.trust_ratios import ByFormula

Gradients = dict[str, Array]
Buckets = Sequence[tuple[int, int, list[list[str]]]]  # step, micro-step, and names by bucket


def replay(case: Case, world: int = 0, buckets: Buckets | None = None) -> dict[str, Any]:
    """The final weights, and how many steps were skipped after each step.

    Args:
        case: with SGD, LAMB or LARS, and without NaNs.
        world: the data ranks of a regression.
        buckets: what a rank of a regression reduced together.
    """
    return _Replay(case, world).run(buckets)


def essence(case: Case) -> Case:
    """What the language model's training depends on; the rest is where it runs."""
    assert case.layout is not None
    layout = Layout(case.layout.data, expert=case.layout.expert)
    return replace(case, layout=layout, stage=max(case.stage, 1), dtype="fp32", fp32_sums=False)


def replays(cases: dict[str, Case]) -> dict[str, Any]:
    """The final weights of several runs of the language model."""
    return {name: replay(case)["weights"] for name, case in cases.items()}


class _Replay:
    def __init__(self, case: Case, world: int) -> None:
        self.case = case
        self.rule = case.block or {}
        self.world = world if case.layout is None else case.layout.data
        self.expert_ranks = 1 if case.layout is None else case.layout.expert
        self.exact = replace(case, dtype="fp64")
        self.model, self.named = _model(case)
        groups = groups_of(self.model, case)
        self.optimizer = (
            torch.optim.SGD(groups, lr=LR, momentum=0.5)
            if case.optimizer == "SGD"
            else ByFormula(groups, case.optimizer, **case.params)
        )
        self.per_worker = self.rule.get("worker", 1)
        self.ahead = _Ahead(self.rule, self.named, self.world // self.per_worker, self.expert_ranks)
        self.smooth = _Smooth(self.rule.get("scaling", {}).get("params", {}).get("momentum", 0.0))

    def run(self, buckets: Buckets | None) -> dict[str, Any]:
        skipped, count = [], 0
        for step in range(self.case.steps):
            total = {name: torch.zeros_like(p) for name, p in self.named.items() if p.requires_grad}
            agreed = [self._reduce(total, step, *reduction) for reduction in self._reductions(step, buckets)]
            if any(agreed):
                for name, value in total.items():
                    self.named[name].grad = value  # zeros if unused, as DeepSpeed has it
                self.optimizer.step()
                self.smooth.commit()
                self.ahead.commit()
            else:
                count += 1
                self.smooth.drop()
                self.ahead.drop()
            skipped.append(count)
        return {
            "weights": {n: p.detach().double().numpy() for n, p in self.named.items()},
            "skipped": skipped,
        }

    def _reductions(self, step: int, buckets: Buckets | None) -> Iterator[tuple[list[int], list[list[str]]]]:
        """The micro-steps of each reduction of a step, and the names of what is decided on together."""
        every_micro = list(range(self.case.accumulation))
        if buckets is not None:
            for at, micro, together in buckets:
                if at == step:
                    yield every_micro if self.case.stage < 2 else [micro], together
            return
        for micros in [every_micro] if self.case.stage < 2 else [[micro] for micro in every_micro]:
            yield micros, [[name] for name in self.named]

    def _reduce(self, total: dict[str, Any], step: int, micros: list[int], together: list[list[str]]) -> bool:
        """Add the combination of what is reduced to the step's gradient; whether any worker agreed."""
        workers = self._workers(step, micros)
        decided = None
        if self.rule.get("scope") == "model":
            reduced = set().union(*together)
            names = [name for name in self.named if name in reduced and name in workers[0]]
            decided = _gaf(self.rule, [np.concatenate([w[n] for n in names]) for w in workers], step)
        agreed = False
        for names in together:
            for part in [[name] for name in names] if _by_parameter(self.rule) else [names] if names else []:
                agreed |= self._combine(total, step, part, workers, decided)
        return agreed

    def _workers(self, step: int, micros: list[int]) -> list[Gradients]:
        """Each worker's gradient, taken from its own point."""
        replicas = []
        for data in range(self.world):
            with self.ahead.offset(data // self.per_worker, self.optimizer, step):
                replicas.append(self._gradients(step, micros, data))
        size = self.per_worker
        workers = [_mean(replicas[at : at + size]) for at in range(0, len(replicas), size)]
        for number, gradients in enumerate(workers):
            self.ahead.note(number, gradients)
        return workers

    def _gradients(self, step: int, micros: list[int], data: int) -> Gradients:
        self.model.zero_grad()
        for micro in micros:
            (loss_of(self.model, step, micro, data, self.exact) / self.case.accumulation).backward()
        trained = [(n, p) for n, p in self.named.items() if p.requires_grad and p.numel()]
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained}
        return {n: gradient.reshape(-1).double().numpy().copy() for n, gradient in found.items()}

    def _combine(
        self,
        total: dict[str, Any],
        step: int,
        names: list[str],
        workers: list[Gradients],
        decided: tuple[Array, bool] | None,
    ) -> bool:
        stacked = [self._reducers(name, [worker[name] for worker in workers]) for name in names]
        grads = [np.concatenate([of_name[i] for of_name in stacked]) for i in range(len(stacked[0]))]
        weights, agreed = decided or _weights(self.rule, grads, step, names[0], sorted(workers[0]))
        share = len(grads) / len(workers)
        for name, of_name in zip(names, stacked, strict=True):
            mean = weights @ np.stack(of_name)
            if "scaling" in self.rule:
                gamma = self.rule["scaling"].get("params", {}).get("gamma", 0.1)
                mean, factors = vrgd(of_name, weights, [len(of_name[0])], gamma)
                mean = mean * self.smooth.apply(name, factors)
            total[name] += torch.from_numpy(mean * share).view_as(total[name])
        return agreed

    def _reducers(self, name: str, grads: list[Array]) -> list[Array]:
        """The gradients of those who reduce a parameter; neighbours share experts."""
        if ".experts." not in name:
            return grads
        size = self.expert_ranks
        return [np.sum(grads[at : at + size], axis=0) for at in range(0, len(grads), size)]


def _model(case: Case) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """The whole model, in float64 but for experts, whose gate is float32; parameters by their plain names."""
    if case.layout is None:
        model: torch.nn.Module = models.Regression(empty=case.stage < 3).double()
        return model, dict(model.named_parameters())
    model = models.Language(models.Plain(), case.tied, case.experts)
    named = {}
    for name, p in model.named_parameters():
        piece = models.piece_of(name, 0, 1, 0, ())
        models.fill(p, piece)
        named[piece.name] = p
    return model if case.experts else model.double(), named


def _mean(replicas: list[Gradients]) -> Gradients:
    return {name: np.mean([grads[name] for grads in replicas], axis=0) for name in replicas[0]}


def _by_parameter(rule: dict[str, Any]) -> bool:
    mixing = rule.get("mixing", {})
    if mixing.get("params", {}).get("granularity") == "parameter":
        return True
    return bool(mixing.get("type") == "GAF" and rule.get("scope") == "parameter")


def _gaf(rule: dict[str, Any], grads: list[Array], step: int) -> tuple[Array, bool]:
    params = dict(rule["mixing"].get("params", {}))
    shuffled = params.pop("order", "shuffled") == "shuffled"
    if len(grads) == 1:
        return np.ones(1), True
    seed, gram = rule.get("seed", 1234), rule.get("gram", "exact")
    if gram != "exact":
        grads = [sketch(g, gram["sketch"], seed, step) for g in grads]
    order = philox(seed, step, 1).permutation(len(grads)).tolist() if shuffled else None
    return gaf_weights(grads, order=order, **params)


def _weights(
    rule: dict[str, Any], grads: list[Array], step: int, name: str, every_name: list[str]
) -> tuple[Array, bool]:
    """The workers' weights for what begins with a name, and whether any worker agreed."""
    mixing = rule.get("mixing", {})
    if mixing.get("type") == "GAF":
        return _gaf(rule, grads, step)
    if mixing.get("type") == "GradientMix":
        alpha = np.full(len(grads), mixing.get("params", {}).get("alpha", 1.0))
        drawn = philox(rule.get("seed", 1234), step, 0).dirichlet(alpha, size=len(every_name))
        return drawn[every_name.index(name) if _by_parameter(rule) else 0], True
    return np.full(len(grads), 1 / len(grads)), True


class _Ahead:
    """Each worker's past gradient, and parameters offset by it."""

    def __init__(
        self, rule: dict[str, Any], named: dict[str, torch.nn.Parameter], num_workers: int, expert_ranks: int
    ) -> None:
        self.is_noise = rule.get("extrapolation", {}).get("type") == "Noise"
        self.seed = rule.get("seed", 1234)
        self.params = rule.get("extrapolation", {}).get("params", {})
        self.named = named
        self.expert_ranks = expert_ranks
        self.past: list[Gradients] = [{} for _ in range(num_workers)]
        self.present: list[Gradients] = [{} for _ in range(num_workers)]

    @contextlib.contextmanager
    def offset(self, worker: int, optimizer: torch.optim.Optimizer, step: int) -> Iterator[None]:
        before = {name: p.detach().clone() for name, p in self.named.items()}
        if self.is_noise:
            self._add_noise(worker, step)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name in self.past[worker]:
            p, gradient = self.named[name], self._past(name, worker)
            rate = self.params["lr"] if "lr" in self.params else self.params["lr_ratio"] * rates[id(p)]
            if self.params.get("layerwise"):
                norm = np.linalg.norm(gradient)
                rate = rate * float(p.detach().norm()) / norm if norm > 0 else 0.0
            p.data.add_(torch.from_numpy(gradient).view_as(p).to(p.dtype), alpha=-rate)
        yield
        for name, p in self.named.items():
            p.data.copy_(before[name])

    def _add_noise(self, worker: int, step: int) -> None:
        """As ZeRO-3 draws it, by the names of parameters."""
        for name, p in self.named.items():
            if not p.requires_grad:
                continue
            words = f"{self.seed},{worker},{step},{name}".encode()
            random = torch.Generator()
            random.manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1)
            drawn = torch.empty(p.numel())
            if self.params.get("distribution") == "uniform":
                drawn.uniform_(-(3.0**0.5), 3.0**0.5, generator=random)
            else:
                drawn.normal_(generator=random)
            root_mean_square = float(p.detach().square().mean().sqrt())
            std = self.params.get("std", self.params.get("std_ratio", 0.0) * root_mean_square)
            p.data.add_(drawn.double().view_as(p), alpha=std)

    def _past(self, name: str, worker: int) -> Array:
        """A worker's past gradient; of experts, the mean over the ranks that share them."""
        if ".experts." not in name:
            return self.past[worker][name]
        first = worker // self.expert_ranks * self.expert_ranks
        sharing = self.past[first : first + self.expert_ranks]
        return np.asarray(np.mean([past[name] for past in sharing], axis=0))

    def note(self, worker: int, gradients: Gradients) -> None:
        for name, gradient in gradients.items() if self.params and not self.is_noise else ():
            self.present[worker][name] = self.present[worker].get(name, 0.0) + gradient

    def commit(self) -> None:
        self.past, self.present = self.present, [{} for _ in self.present]

    def drop(self) -> None:
        self.past, self.present = [{} for _ in self.past], [{} for _ in self.past]


@dataclass
class _Smooth:
    """p of VR-Adam, by parameter: p moves on by the mean of the step's factors."""

    beta: float
    mean: Gradients = field(default_factory=dict)
    pending: dict[str, list[Array]] = field(default_factory=dict)
    steps: int = 0

    def apply(self, name: str, factors: Array) -> Array:
        if not self.beta:
            return factors
        self.pending.setdefault(name, []).append(factors)
        smoothed = self.beta * self.mean.get(name, 0.0) + (1 - self.beta) * factors
        return np.asarray(smoothed / (1 - self.beta ** (self.steps + 1)))

    def commit(self) -> None:
        for name, factors in self.pending.items():
            mean = np.mean(factors, axis=0)
            self.mean[name] = self.beta * self.mean.get(name, 0.0) + (1 - self.beta) * mean
        self.pending.clear()
        self.steps += 1

    def drop(self) -> None:
        self.pending.clear()
