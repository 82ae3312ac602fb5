"""The small language model of every layout once more, in one process, from the reference of the rules alone.

GAF decides by parameter here, so what lies in which bucket does not matter. Experts that are spread over
ranks have fewer workers, each the sum over ranks that share them. Where the block makes several replicas one
worker, its gradient is their mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support import parallel_models as models
from tests.support.parallel import LR, Case
from tests.support.reference import gaf_weights, philox, vrgd

Gradients = dict[str, NDArray[np.float64]]


def replay(case: Case) -> dict[str, NDArray[np.float64]]:
    """The final weights of `case.layout.data` workers; in float64, but for experts, whose gate is float32."""
    model = models.Model(models.Plain(), case.tied, case.experts)
    named = {}
    for name, p in model.named_parameters():
        piece = models.piece_of(name, 0, 1, 0, ())
        models.fill(p, piece)
        named[piece.name] = p
    if not case.experts:
        model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
    size = (case.block or {}).get("worker", 1)
    past: list[Gradients] = [{} for _ in range(case.layout.data // size)]
    for step in range(case.steps):
        once = [range(case.accumulation)] if case.stage < 2 else [[m] for m in range(case.accumulation)]
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        own: list[Gradients] = [{} for _ in past]
        for micros in once:
            workers = []
            for data in range(case.layout.data):
                with _offset(named, past, data // size, case):
                    workers.append(_gradients(model, step, micros, data, case))
            workers = [_mean(workers[at : at + size]) for at in range(0, len(workers), size)]
            for name in named:
                grads = _reducers(name, [worker[name] for worker in workers], case.layout.expert)
                share = len(grads) / len(workers)
                combined = _combine(case.block or {}, grads, step) * share
                total[name] += torch.from_numpy(combined).view_as(total[name])
            for worker, mine in zip(workers, own, strict=True):
                for name, gradient in worker.items():
                    mine[name] = mine.get(name, 0.0) + gradient
        for name, p in named.items():
            p.grad = total[name].to(p.dtype)
        optimizer.step()
        past = own
    return {name: p.detach().double().numpy() for name, p in named.items()}


def _reducers(name: str, grads: list[Any], expert_ranks: int) -> list[Any]:
    """The gradients of those who reduce a parameter; neighbours share experts."""
    if ".experts." not in name:
        return grads
    return [sum(grads[at : at + expert_ranks]) for at in range(0, len(grads), expert_ranks)]


def _mean(replicas: list[Gradients]) -> Gradients:
    return {name: sum(grads[name] for grads in replicas) / len(replicas) for name in replicas[0]}


def _gradients(model: Any, step: int, micros: Any, data: int, case: Case) -> Gradients:
    model.zero_grad()
    for micro in micros:
        words, targets = models.batch(step, micro, data)
        logits = model(words)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (loss / case.accumulation).backward()
    found = {}
    for name, p in model.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        found[models.piece_of(name, 0, 1, 0, ()).name] = gradient.reshape(-1).double().numpy().copy()
    return found


@contextlib.contextmanager
def _offset(named: dict[str, Any], past: list[Gradients], data: int, case: Case) -> Iterator[None]:
    rule = (case.block or {}).get("extrapolation")
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, gradient in past[data].items() if rule else ():
        if ".experts." in name:
            size = case.layout.expert
            first = data // size * size
            gradient = sum(past[other][name] for other in range(first, first + size)) / size
        p = named[name]
        p.data -= torch.from_numpy(rule["params"]["lr"] * gradient).view_as(p).to(p.dtype)
    yield
    for name, p in named.items():
        p.data.copy_(before[name])


def _combine(rule: dict[str, Any], grads: list[Any], step: int) -> Any:
    num_workers = len(grads)
    weights, seed = np.full(num_workers, 1 / num_workers), rule.get("seed", 1234)
    kind = rule.get("mixing", {}).get("type", "Mean")
    if kind == "GradientMix":
        weights = philox(seed, step, 0).dirichlet(np.ones(num_workers), size=1)[0]
    elif kind == "GAF" and num_workers > 1:
        order = philox(seed, step, 1).permutation(num_workers).tolist()
        weights, _ = gaf_weights(grads, order=order, **rule["mixing"].get("params", {}))
    if "scaling" in rule:
        mean, factors = vrgd(grads, weights, [len(grads[0])], rule["scaling"]["params"]["gamma"])
        return mean * factors
    return weights @ np.stack(grads)
