"""Training the small language model under DeepSpeed in any parallelism, and its weights in the form of the
model on one rank.

`run` works without a gradmix block as well, with plain DeepSpeed: a layout is right here if plain DeepSpeed
trains it as it trains the model without it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from tests.support import parallel_models as models
from tests.support.parallel_models import Piece

LR = 0.05


@dataclass(frozen=True)
class Layout:
    """How many ranks of each kind.

    `kind` is who splits tensors: "mpu" (layers of our own), "megatron" or "autotp"; or who tells DeepSpeed of
    sequence ranks: "mpu" (one of our own), "state" (DeepSpeed's `parallel_state_sp`), "mesh" (`mesh_param`)
    or "config". Experts are spread over data ranks, so they add none.
    """

    data: int = 1
    tensor: int = 1
    pipe: int = 1
    expert: int = 1
    sequence: int = 1
    kind: str = "mpu"

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipe * self.sequence


@dataclass(frozen=True)
class Case:
    """One training run."""

    layout: Layout
    block: dict[str, Any] | None = None
    stage: int = 0
    dtype: str = "fp32"
    fp32_sums: bool = False  # gradients in bf16 are summed up in fp32
    accumulation: int = 1
    steps: int = 8
    optimizer: str = "SGD"
    tied: bool = False
    experts: int = 0  # of the last block; 0 is an MLP
    nan_at: tuple[int, int] | None = None  # step and data rank of batches whose loss is NaN
    config: dict[str, Any] = field(default_factory=dict)


def alone(case: Case) -> Case:
    """The same training without model parallelism."""
    return replace(case, layout=Layout(data=case.layout.data))


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": models.BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**6,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage},
        **case.config,
    }
    if case.dtype == "bf16" and "bf16" not in config:
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        # DeepSpeed 0.19.8 does not scale the loss at ZeRO-0, but divides gradients by the scale.
        config["fp16"] = {"enabled": True, "loss_scale": 64 if case.stage else 1}
    if case.fp32_sums:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.block is not None:
        config["gradmix"] = case.block
    return config


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    """On a rank: several runs, one after the other, in one process group."""
    return {name: run(case) for name, case in cases.items()}


def run(case: Case) -> dict[str, Any]:
    """On a rank: train, and hand back

    - weights: every weight, whole, as this rank's replica of the model has it
    - local: the bytes of each piece this rank holds, by the piece's name
    - stats, skipped: what `ds_gradmix.stats` said after each step, and `engine.skipped_steps`
    - losses: of this rank's batches, where it computes one
    - mixing_states: at the end, of each group of workers
    """
    layout = case.layout
    assert dist.get_world_size() == layout.world
    assert not case.experts or layout.world == layout.data, "experts, but tensor, pipe or sequence ranks too"
    engine = None
    try:
        work = _Work(case)
        engine = work.engine
        told = work.train()
        pieces = {piece: p.detach() for piece, p in work.pieces(engine.module)}
        return {
            "weights": _gathered(pieces, work.data_rank // layout.expert),
            "local": _bytes(pieces),
            **told,
        }
    finally:
        if engine is not None:
            engine.destroy()
        reset()


def reset() -> None:
    """Undo what a run leaves behind in the process; the next may be of any other layout."""
    from deepspeed.module_inject import set_autotp_mode
    from deepspeed.runtime.pipe import p2p
    from deepspeed.utils import groups

    groups._release_process_group_references()
    p2p._groups = p2p._grid = None
    set_autotp_mode(training=False)
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    gc.collect()


class _Work:
    """An engine, and this rank's place."""

    def __init__(self, case: Case) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        import ds_gradmix

        get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but true arithmetic
        if case.block is not None:
            ds_gradmix.enable()
        self.case = case
        layout = case.layout
        rank = dist.get_rank()
        self.tensor_rank = rank % layout.tensor
        self.sequence_rank = rank % layout.sequence
        self.data_rank = rank // (layout.tensor * layout.sequence) % layout.data
        options: dict[str, Any] = {"config": ds_config(case)}
        model = self._model(options)
        for piece, p in self.pieces(model, split=layout.kind != "autotp"):
            models.fill(p, piece)
        parameters = _groups(model, case)
        if case.optimizer == "Adam":
            optimizer: Any = torch.optim.Adam(parameters, lr=LR / 5, eps=1e-3)  # not to divide noise by noise
        else:
            optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.5)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, **options)[0]

    def _model(self, options: dict[str, Any]) -> Any:
        case, layout = self.case, self.case.layout
        parts: Any = models.Plain(layout.expert)
        if layout.tensor > 1 and layout.kind == "mpu":
            parts, options["mpu"] = _by_hand(layout)
        elif layout.tensor > 1 and layout.kind == "megatron":
            parts, options["mpu"] = _megatron(layout)
        elif layout.tensor > 1:
            options["config"]["tensor_parallel"] = _autotp(layout)
        if layout.sequence > 1:
            _spread(parts, layout, options)
        if layout.pipe > 1:
            options.pop("mpu", None)
            return _pipeline(parts, case)
        return models.Model(parts, case.tied, case.experts)

    def pieces(self, model: Any, split: bool = True) -> Iterator[tuple[Piece, torch.nn.Parameter]]:
        """What this rank holds. AutoTP takes a model that is not split yet, and leaves embeddings whole."""
        layout = self.case.layout
        first_expert = self.data_rank % layout.expert * (self.case.experts // layout.expert)
        whole = ("embed.weight",) if layout.kind == "autotp" else ()
        size = layout.tensor if split else 1
        for name, p in model.named_parameters():
            yield models.piece_of(name, self.tensor_rank, size, first_expert, whole), p

    def train(self) -> dict[str, Any]:
        import ds_gradmix
        from ds_gradmix.engines.install import reducer_of

        stats, skipped, losses = [], [], []
        for step in range(self.case.steps):
            losses.append(self._step(step))
            stats.append(ds_gradmix.stats(self.engine))
            skipped.append(self.engine.skipped_steps)
        reducer = reducer_of(self.engine)
        states = [] if reducer is None else [state.values_KW.tolist() for state in reducer.state.mixing]
        return {"stats": stats, "skipped": skipped, "losses": losses, "mixing_states": states}

    def _step(self, step: int) -> float:
        batches = [models.batch(step, micro, self.data_rank) for micro in range(self.case.accumulation)]
        if self.case.nan_at == (step, self.data_rank):
            batches = [(words, torch.full_like(targets, models.NAN)) for words, targets in batches]
        if self.case.layout.pipe > 1:
            return float(self.engine.train_batch(iter(batches)))
        losses = []
        size = self.case.layout.sequence
        for words, targets in batches:
            words, targets = (x.chunk(size, dim=1)[self.sequence_rank] for x in (words, targets))
            loss = models.loss_of(self.engine(words), targets) / size  # added up over sequence ranks
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


def _groups(model: Any, case: Case) -> list[Any]:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    parameters = list(model.parameters())
    if not case.experts:
        return parameters
    return split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "all"})


def _by_hand(layout: Layout) -> Any:
    import functools

    from tests.support import tensor_layers

    mpu = tensor_layers.TensorParallel(layout.data * layout.pipe, layout.tensor)
    group = mpu.get_tensor_model_parallel_group()
    parts = models.Plain()
    parts.column = functools.partial(tensor_layers.Column, group=group)
    parts.row = functools.partial(tensor_layers.Row, group=group)
    parts.head = functools.partial(tensor_layers.Head, group=group)
    parts.vocabulary = lambda: tensor_layers.Vocabulary(models.WORDS, models.WIDTH, group)
    return parts, mpu


def _megatron(layout: Layout) -> Any:
    from ds_gradmix.megatron import ParallelState
    from tests.support.megatron_layers import Megatron

    parts = Megatron(layout.tensor)
    return parts, ParallelState()


def _autotp(layout: Layout) -> dict[str, Any]:
    columns = {"patterns": [r".*\.(query|key|value|up)\.weight$"], "partition_type": "column"}
    rows = {"patterns": [r".*\.(out|down)\.weight$"], "partition_type": "row"}
    head = {"patterns": [r"^head\.weight$"], "partition_type": "column", "gather_output": True}
    specs = {"use_default_specs": False, "layer_specs": [columns, rows, head]}
    return {"autotp_size": layout.tensor, "partition_config": specs}


def _spread(parts: Any, layout: Layout, options: dict[str, Any]) -> None:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    from tests.support.sequence_layers import SequenceParallel, Ulysses

    mpu = SequenceParallel(layout.data, layout.sequence)
    parts.attention = lambda: Ulysses(mpu.sequence_group)
    if layout.kind == "mpu":
        options["mpu"] = mpu
    elif layout.kind == "state":
        parallel_state_sp.initialize_sequence_parallel(layout.sequence)
        options["mpu"] = parallel_state_sp
    elif layout.kind == "mesh":
        options["mesh_param"] = (layout.data, layout.sequence)
    else:
        sizes = {"data_parallel_size": layout.data, "sequence_parallel_size": layout.sequence}
        options["config"].update(sizes)


def _pipeline(parts: Any, case: Case) -> Any:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

    layout = case.layout
    topology = PipeDataParallelTopology(layout.pipe, layout.data)
    if layout.tensor > 1:
        topology = PipeModelDataParallelTopology(layout.pipe, layout.tensor, layout.data)
    return PipelineModule(
        models.pipeline_layers(parts, case.tied),
        topology=topology,
        loss_fn=models.loss_of,
        partition_method="type:Block",  # one that has only norms breaks BF16_Optimizer
    )


def _bytes(pieces: dict[Piece, torch.Tensor]) -> dict[str, bytes]:
    return {str(piece): p.contiguous().view(torch.uint8).numpy().tobytes() for piece, p in pieces.items()}


def _gathered(pieces: dict[Piece, torch.Tensor], replica: int) -> dict[str, NDArray[np.float64]]:
    """Whole weights: this rank's own pieces, the others from ranks of its replica."""
    mine = {piece: p.double().numpy() for piece, p in pieces.items()}
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, (replica, mine))
    found: dict[Piece, Any] = {}
    for theirs, held in all_ranks:
        if theirs == replica:
            found = {**held, **found}
    return models.assemble({**found, **mine})


def drift(results: list[dict[str, Any]]) -> list[str]:
    """Pieces that not all ranks which hold them have bit for bit alike."""
    copies: dict[str, set[bytes]] = {}
    for result in results:
        for name, held in result["local"].items():
            copies.setdefault(name, set()).add(held)
    return sorted(name for name, found in copies.items() if len(found) > 1)


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two models' weights, relative to the largest weight."""
    assert one["weights"].keys() == other["weights"].keys()
    largest = max(float(np.abs(w).max()) for w in other["weights"].values())
    return (
        max(float(np.abs(w - other["weights"][name]).max()) for name, w in one["weights"].items()) / largest
    )
