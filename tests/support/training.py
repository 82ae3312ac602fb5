"""Training a small model: on W ranks under DeepSpeed, and once more in one process, in float64, from the
reference.

The replay follows DeepSpeed in what the rules depend on, which gradients are reduced together, by what the
ranks say their buckets held; everything else it does on its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.reference import gaf_weights, philox, vrgd

STEPS = 12
LR = 0.05


class Model(torch.nn.Module):
    """Layers of awkward sizes, one frozen, one unused, one parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(13, 31)
        self.frozen = torch.nn.Linear(31, 31)
        self.second = torch.nn.Linear(31, 29)
        self.unused = torch.nn.Linear(5, 3)
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.last = torch.nn.Linear(29, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.frozen(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.second(hidden))) * self.scale


@dataclass(frozen=True)
class Case:
    """One training run; with stage 1, bf16 and `grad_accum_dtype: "fp32"` it is BF16_Optimizer's."""

    block: dict[str, Any] | None
    stage: int = 2
    accumulation: int = 1
    bucket: int = 10**8
    dtype: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    two_groups: bool = False
    steps: int = STEPS
    nan_at: tuple[int, int] | None = None  # step and rank of a batch with a NaN


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    x = torch.randn(4, 13, generator=random, dtype=torch.float64)
    target = torch.stack([x[:, :3].sum(1), x[:, 3] * x[:, 4], x[:, 5].sin()], dim=1)
    return x, target + 0.5 * torch.randn(4, 3, generator=random, dtype=torch.float64)


def loss_of(model: Any, step: int, micro: int, rank: int, case: Case) -> torch.Tensor:
    x, target = batch(step, micro, rank)
    if case.nan_at == (step, rank):
        x = x * float("nan")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[case.dtype]
    return ((model(x.to(dtype)).to(torch.float64) - target) ** 2).mean()


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": 0.5}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": case.bucket, **case.zero},
        **case.config,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.block is not None:
        config["gradmix"] = case.block
    return config


def groups_of(model: Model, case: Case) -> Any:
    named = [(name, p) for name, p in model.named_parameters()]
    if not case.two_groups:
        return [p for _, p in named]
    small = [p for name, p in named if name.endswith("bias") or name == "scale"]
    large = [p for _, p in named if all(p is not q for q in small)]
    return [{"params": large, "lr": LR}, {"params": small, "lr": LR / 2}]


def build(case: Case, model: Model | None = None) -> Any:
    """An engine; with a block or without."""
    import deepspeed

    import ds_gradmix

    ds_gradmix.enable()
    model = model or Model()
    options = {"lr": LR, "momentum": 0.5}
    parameters = groups_of(model, case)
    optimizer = torch.optim.SGD(parameters, **options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case))[0]


def weights_of(engine: Any) -> dict[str, NDArray[np.float64]]:
    return {name: p.detach().double().cpu().numpy().copy() for name, p in engine.module.named_parameters()}


def train(engine: Any, case: Case, first: int = 0, last: int | None = None) -> dict[str, Any]:
    """Train; the final weights, what each reduction held, and what stats() told after each step."""
    import ds_gradmix

    rank = torch.distributed.get_rank()
    held: list[list[str]] = []
    _note_buckets(engine, held)
    buckets, told, skipped = [], [], []
    for step in range(first, case.steps if last is None else last):
        for micro in range(case.accumulation):
            engine.backward(loss_of(engine, step, micro, rank, case))
            engine.step()
            if held:
                buckets.append((step, micro, list(held)))
                held.clear()
        told.append(ds_gradmix.stats(engine))
        skipped.append(engine.skipped_steps)
    return {"weights": weights_of(engine), "buckets": buckets, "stats": told, "skipped": skipped}


def _note_buckets(engine: Any, held: list[list[str]]) -> None:
    """Have the names of every bucket's parameters noted when it is reduced."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "average_tensor"):  # ZeRO-1 and ZeRO-2
        reduce = optimizer.average_tensor

        def noting(tensor: torch.Tensor, dtype: torch.dtype) -> None:
            params = optimizer.ipg_buckets[dtype].params
            held.append([optimizer.param_names[optimizer.param_dict[i]] for _, _, i in params])
            reduce(tensor, dtype)

        optimizer.average_tensor = noting
        return
    allreduce = engine.allreduce_and_copy

    def noting_all(bucket: Any, *args: Any, **kwargs: Any) -> Any:
        names = {p.grad.data_ptr(): [n] for n, p in engine.module.named_parameters() if p.grad is not None}
        if hasattr(optimizer, "bf16_groups"):
            flats = zip(optimizer.fp32_groups_gradients_flat, optimizer.bf16_groups, strict=True)
            names = {flat.data_ptr(): [optimizer.param_names[p] for p in group] for flat, group in flats}
        found = [name for tensor in bucket for name in names[tensor.data_ptr()]]
        held.append(found)
        return allreduce(bucket, *args, **kwargs)

    engine.allreduce_and_copy = noting_all


def run_case(case: Case) -> dict[str, Any]:
    return train(build(case), case)


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    """On a rank: several runs, one after the other, in one process group."""
    return {name: run_case(case) for name, case in cases.items()}


def replay(case: Case, world: int, buckets: list[tuple[int, int, list[list[str]]]]) -> dict[str, Any]:
    """The same training in one process, float64: the final weights, and the steps skipped so far after each
    step.
    """
    exact = copy.deepcopy(case)
    object.__setattr__(exact, "dtype", "fp64")
    model = Model().double()
    optimizer = torch.optim.SGD(groups_of(model, case), lr=LR, momentum=0.5)
    named = dict(model.named_parameters())
    rule = case.block or {}
    smooth = Smooth(rule)
    skipped, count = [], 0
    ahead = Ahead(rule, named, world)
    for step in range(case.steps):
        gradient = {name: torch.zeros_like(p) for name, p in named.items() if p.requires_grad}
        agreed = False
        for at, micro, bucket_list in buckets:
            if at != step:
                continue
            micros = range(case.accumulation) if case.stage < 2 else [micro]
            workers = []
            for rank in range(world):
                with ahead.offset(rank, optimizer):
                    workers.append(_gradients(model, exact, step, micros, rank))
                ahead.note(rank, workers[-1])
            decided = _model_weights(rule, workers, step)
            for names in bucket_list:
                if names:
                    agreed |= _reduce(names, workers, rule, step, gradient, smooth, decided)
        if agreed:
            for name, value in gradient.items():
                named[name].grad = value if name.split(".")[0] not in ("unused", "empty") else None
            optimizer.step()
            smooth.commit()
            ahead.commit()
        else:
            count += 1
            smooth.pending.clear()
            ahead.drop()
        skipped.append(count)
    return {"weights": {n: p.detach().numpy() for n, p in named.items()}, "skipped": skipped}


def _gradients(model: Model, case: Case, step: int, micros: Any, rank: int) -> dict[str, NDArray[np.float64]]:
    model.zero_grad()
    for micro in micros:
        (loss_of(model, step, micro, rank, case) / case.accumulation).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained}
    return {n: grad.reshape(-1).numpy().copy() for n, grad in grads.items()}


class Ahead:
    """Each worker's past gradient, and parameters offset by it."""

    def __init__(self, rule: dict[str, Any], named: dict[str, torch.nn.Parameter], world: int) -> None:
        self.params = rule.get("extrapolation", {}).get("params", {})
        self.named = named
        self.past: list[dict[str, Any]] = [{} for _ in range(world)]
        self.present: list[dict[str, Any]] = [{} for _ in range(world)]

    @contextlib.contextmanager
    def offset(self, rank: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        before = {name: p.detach().clone() for name, p in self.named.items()}
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, gradient in self.past[rank].items():
            p = self.named[name]
            rate = self.params["lr"] if "lr" in self.params else self.params["lr_ratio"] * rates[id(p)]
            if self.params.get("layerwise"):
                norm = np.linalg.norm(gradient)
                rate = rate * float(p.detach().norm()) / norm if norm > 0 else 0.0
            p.data.add_(torch.from_numpy(gradient).view_as(p), alpha=-rate)
        yield
        for name, p in self.named.items():
            p.data.copy_(before[name])

    def note(self, rank: int, gradients: dict[str, Any]) -> None:
        for name, gradient in gradients.items() if self.params else ():
            self.present[rank][name] = self.present[rank].get(name, 0.0) + gradient

    def commit(self) -> None:
        self.past, self.present = self.present, [{} for _ in self.present]

    def drop(self) -> None:
        self.past, self.present = [{} for _ in self.past], [{} for _ in self.past]


class Smooth:
    """p of VR-Adam, by parameter: p moves on by the mean of the step's factors."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.beta = rule.get("scaling", {}).get("params", {}).get("momentum", 0.0)
        self.mean: dict[str, Any] = {}
        self.pending: dict[str, list[Any]] = {}
        self.steps = 0

    def apply(self, name: str, factors: Any) -> Any:
        if not self.beta:
            return factors
        self.pending.setdefault(name, []).append(factors)
        smoothed = self.beta * self.mean.get(name, 0.0) + (1 - self.beta) * factors
        return smoothed / (1 - self.beta ** (self.steps + 1))

    def commit(self) -> None:
        for name, factors in self.pending.items():
            self.mean[name] = self.beta * self.mean.get(name, 0.0) + (1 - self.beta) * sum(factors) / len(
                factors
            )
        self.pending.clear()
        self.steps += 1


def _gaf(rule: dict[str, Any], grads: list[Any], step: int) -> tuple[Any, bool]:
    params = dict(rule["mixing"].get("params", {}))
    shuffled = params.pop("order", "shuffled") == "shuffled"
    order = philox(rule.get("seed", 1234), step, 1).permutation(len(grads)).tolist() if shuffled else None
    return gaf_weights(grads, order=order, **params)


def _model_weights(rule: dict[str, Any], workers: list[dict[str, Any]], step: int) -> tuple[Any, bool] | None:
    if rule.get("scope") != "model":
        return None
    return _gaf(rule, [np.concatenate([w[n] for n in sorted(w)]) for w in workers], step)


def _reduce(
    names: list[str],
    workers: list[dict[str, Any]],
    rule: dict[str, Any],
    step: int,
    gradient: dict[str, torch.Tensor],
    smooth: Smooth,
    decided: tuple[Any, bool] | None,
) -> bool:
    """Add the combination of one bucket to the gradient; whether any worker agreed."""
    world = len(workers)
    kind = rule.get("mixing", {}).get("type", "Mean")
    params = rule.get("mixing", {}).get("params", {})
    by_parameter = kind == "GAF" and rule.get("scope") == "parameter"
    by_parameter |= params.get("granularity") == "parameter"
    any_agreed = False
    for part in [[name] for name in names] if by_parameter else [names]:
        stacked = [np.concatenate([worker[name] for name in part]) for worker in workers]
        weights, agreed = np.full(world, 1 / world), True
        if decided is not None:
            weights, agreed = decided
        elif kind == "GAF":
            weights, agreed = _gaf(rule, stacked, step)
        elif kind == "GradientMix":
            alpha, each = np.full(world, params.get("alpha", 1.0)), sorted(workers[0])
            random = philox(rule.get("seed", 1234), step, 0)
            weights = random.dirichlet(alpha, size=len(each))[each.index(part[0]) if by_parameter else 0]
        any_agreed |= agreed
        for name in part:
            grads = [worker[name] for worker in workers]
            mean = weights @ np.stack(grads)
            if "scaling" in rule:
                gamma = rule["scaling"].get("params", {}).get("gamma", 0.1)
                mean, factors = vrgd(grads, weights, [len(grads[0])], gamma)
                mean = mean * smooth.apply(name, factors)
            gradient[name] += torch.from_numpy(mean).view_as(gradient[name])
    return any_agreed
