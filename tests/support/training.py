"""Training a model on W ranks under DeepSpeed: a regression on as many data ranks, or, with a layout, the
small language model in any parallelism.

Without a gradmix block it is plain DeepSpeed: a layout is right here if that trains it as it trains the model
without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support import layouts, models
from tests.support.layouts import Layout, Place
from tests.support.models import Regression

STEPS = 12
LR = 0.05
Weights = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """One training run; with stage 1, bf16 and `fp32_sums` it is BF16_Optimizer's."""

    block: dict[str, Any] | None
    stage: int = 2
    accumulation: int = 1
    bucket: int = 10**8
    dtype: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    two_groups: bool = False
    steps: int = STEPS
    nan_at: tuple[int, int] | None = None  # step and data rank of batches whose loss is NaN
    fp32_sums: bool = False  # gradients in bf16 are summed up in fp32
    optimizer: str = "SGD"  # or "Adam", or a type of the config's optimizer section: "Lamb", "LARS"
    params: dict[str, Any] = field(default_factory=dict)  # of that section
    layout: Layout | None = None  # of the language model; without one it is the regression
    tied: bool = False  # the language model's embedding
    experts: int = 0  # of its last block; 0 is an MLP


def without_block(case: Case) -> Case:
    """The same training by stock DeepSpeed."""
    return replace(case, block=None)


def with_stock(cases: dict[str, Case]) -> dict[str, Case]:
    """The cases, and each once without its block, by its repr."""
    return {**cases, **{repr(case): case for case in map(without_block, cases.values())}}


def alone(case: Case) -> Case:
    """The same training without model parallelism."""
    assert case.layout is not None
    return replace(case, layout=Layout(data=case.layout.data))


def place_of(case: Case) -> Place:
    """Where this rank stands."""
    rank = torch.distributed.get_rank()
    return Place(rank) if case.layout is None else case.layout.place(rank)


def loss_of(model: Any, step: int, micro: int, data: int, case: Case, sequence: int = 0) -> torch.Tensor:
    """The loss of a data rank's batch; of a part of it, such that sequence ranks' losses add up."""
    bad = case.nan_at == (step, data)
    if case.layout is None:
        x, wanted = models.numbers(step, micro, data)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[case.dtype]
        x = x * float("nan") if bad else x
        return ((model(x.to(dtype)).to(torch.float64) - wanted) ** 2).mean()
    words, targets = _words(step, micro, data, case)
    size = case.layout.sequence
    words, targets = (part.chunk(size, dim=1)[sequence] for part in (words, targets))
    return models.cross_entropy(model(words), targets) / size


def _words(step: int, micro: int, data: int, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    words, targets = models.words(step, micro, data)
    return words, torch.full_like(targets, models.NAN) if case.nan_at == (step, data) else targets


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": models.BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**6,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": case.bucket, **case.zero},
    }
    if case.layout is None:
        config["optimizer"] = {"type": "SGD", "params": {"lr": LR, "momentum": 0.5}}
    if case.optimizer not in ("SGD", "Adam"):
        config["optimizer"] = {"type": case.optimizer, "params": case.params}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        # DeepSpeed 0.19.8 does not scale the loss at ZeRO-0, but divides gradients by the scale.
        config["fp16"] = {"enabled": True, "loss_scale": 64 if case.stage else 1}
    if case.fp32_sums:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config |= case.config
    return config if case.block is None else config | {"gradmix": case.block}


def groups_of(model: Any, case: Case) -> list[Any]:
    """The optimizer's parameter groups."""
    if case.experts:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        every = {"params": list(model.parameters()), "name": "all"}
        return split_params_into_different_moe_groups_for_optimizer(every)  # type: ignore[no-any-return]
    if not case.two_groups:
        return list(model.parameters())
    named = list(model.named_parameters())
    small = [p for name, p in named if name.endswith("bias") or name == "scale"]
    large = [p for _, p in named if all(p is not q for q in small)]
    return [{"params": large, "lr": LR}, {"params": small, "lr": LR / 2}]


def build(case: Case, model: torch.nn.Module | None = None) -> Any:
    """An engine; with a block or without. A regression may be another model."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_gradmix

    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but true arithmetic
    options: dict[str, Any] = {"config": ds_config(case)}
    if case.block is not None or case.layout is None or case.optimizer not in ("SGD", "Adam"):
        ds_gradmix.enable()
    if case.layout is not None:
        model = layouts.build_model(case.layout, case.tied, case.experts, options)
    model = model or Regression(empty=case.stage < 3)
    groups = groups_of(model, case)
    if case.optimizer not in ("SGD", "Adam"):
        return deepspeed.initialize(model=model, model_parameters=groups, **options)[0]
    if case.optimizer == "Adam":
        optimizer: Any = torch.optim.Adam(groups, lr=LR / 5, eps=1e-3)  # not to divide noise by noise
    else:
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, **options)[0]


def weights_of(engine: Any) -> dict[str, NDArray[np.float64]]:
    with gathered_parameters(engine):
        named = list(engine.module.named_parameters())
        return {name: p.detach().double().cpu().numpy().copy() for name, p in named}


def gathered_parameters(engine: Any) -> contextlib.AbstractContextManager[None]:
    """Whole parameters, which ZeRO-3 keeps in parts."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()))  # type: ignore[no-any-return]


def train(engine: Any, case: Case, first: int = 0, last: int | None = None) -> dict[str, Any]:
    """Train, and hand back

    - weights: at the end, of this rank
    - stats, skipped: what `ds_gradmix.stats` said after each step, and `engine.skipped_steps`
    - losses: of this rank's batches; of a pipeline's step
    - buckets: of a regression, the names of what was reduced together, by step and micro-step
    - mixing_states: at the end, of each group of workers
    """
    import ds_gradmix
    from ds_gradmix.engines.install import reducer_of

    held: list[list[str]] = []
    if case.layout is None:
        _note_buckets(engine, held)
    buckets, told, skipped, losses = [], [], [], []
    for step in range(first, case.steps if last is None else last):
        for micro, loss in _backwards(engine, case, step):
            losses.append(loss)
            if held:
                buckets.append((step, micro, list(held)))
                held.clear()
        told.append(ds_gradmix.stats(engine))
        skipped.append(engine.skipped_steps)
    reducer = reducer_of(engine)
    states = [] if reducer is None else [state.values_KW.tolist() for state in reducer.state.mixing]
    numbers = {"stats": told, "skipped": skipped, "losses": losses, "mixing_states": states}
    return {"weights": weights_of(engine), "buckets": buckets, **numbers}


def _backwards(engine: Any, case: Case, step: int) -> Iterator[tuple[int, float]]:
    """The step's backward passes; their numbers and losses."""
    place = place_of(case)
    if case.layout is not None and case.layout.pipe > 1:
        batches = [_words(step, micro, place.data, case) for micro in range(case.accumulation)]
        yield 0, float(engine.train_batch(iter(batches)))
        return
    for micro in range(case.accumulation):
        loss = loss_of(engine, step, micro, place.data, case, place.sequence)
        engine.backward(loss)
        engine.step()
        yield micro, loss.item()


def _note_buckets(engine: Any, held: list[list[str]]) -> None:
    """Have the names of every bucket's parameters noted when it is reduced."""
    optimizer = engine.optimizer
    scatter = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    if hasattr(optimizer, scatter):
        scattered = getattr(optimizer, scatter)

        def noting_params(params: list[Any], dtype: torch.dtype) -> Any:
            in_order = params
            if optimizer.contiguous_gradients:  # as they lie in the bucket
                in_order = sorted(params, key=lambda p: p.grad.data_ptr())
            held.append([optimizer.param_names[p] for p in in_order])
            return scattered(params, dtype)

        setattr(optimizer, scatter, noting_params)
        return
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


def run(case: Case) -> dict[str, Any]:
    """On a rank: build and train. With a layout `weights` are whole, as this rank's replica of the model has
    them, and `local` the bytes of each piece this rank holds, by the piece's name.
    """
    if case.layout is None:
        return train(build(case), case)
    engine = None
    try:
        engine = build(case)
        told = train(engine, case)
        with gathered_parameters(engine):
            found = layouts.pieces(engine.module, case.layout, case.experts)
            held = {piece: p.detach() for piece, p in found}
            replica = place_of(case).data // case.layout.expert
            return {**told, "weights": layouts.gathered(held, replica), "local": layouts.bytes_of(held)}
    finally:
        if engine is not None:
            engine.destroy()
        layouts.reset()


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    """On a rank: several runs, one after the other, in one process group."""
    return {name: run(case) for name, case in cases.items()}


def drift(results: list[dict[str, Any]]) -> list[str]:
    """Pieces that not all ranks which hold them have bit for bit alike."""
    copies: dict[str, set[bytes]] = {}
    for result in results:
        for name, held in result["local"].items():
            copies.setdefault(name, set()).add(held)
    return sorted(name for name, found in copies.items() if len(found) > 1)


def equal(ours: Weights, theirs: Weights) -> bool:
    """Whether weights are the same bit for bit."""
    return all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def relative(found: Weights, expected: Weights) -> float:
    """The largest difference between weights, relative to the largest weight."""
    assert found.keys() == expected.keys()
    flat, wanted = (np.concatenate([w[n].reshape(-1) for n in sorted(w)]) for w in (found, expected))
    return float(np.abs(flat - wanted).max() / np.abs(wanted).max())


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The same of two runs."""
    return relative(one["weights"], other["weights"])
