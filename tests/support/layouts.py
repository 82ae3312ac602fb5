"""How a model is divided over ranks, and the small language model so divided."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from tests.support import models
from tests.support.models import Piece


class Place(NamedTuple):
    """A rank's number among the ranks of each kind."""

    data: int
    tensor: int = 0
    sequence: int = 0


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

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        inside = self.tensor * self.sequence
        return Place(rank // inside % self.data, rank % self.tensor, rank % self.sequence)


def pieces(
    model: Any, layout: Layout, experts: int, split: bool = True
) -> Iterator[tuple[Piece, torch.nn.Parameter]]:
    """What this rank holds. AutoTP takes a model that is not split yet, and leaves embeddings whole."""
    place = layout.place(dist.get_rank())
    first_expert = place.data % layout.expert * (experts // layout.expert)
    whole = ("embed.weight",) if layout.kind == "autotp" else ()
    size = layout.tensor if split else 1
    for name, p in model.named_parameters():
        yield models.piece_of(name, place.tensor, size, first_expert, whole), p


def build_model(layout: Layout, tied: bool, experts: int, options: dict[str, Any]) -> Any:
    """The language model as `deepspeed.initialize` takes it, which gets further options for it."""
    assert dist.get_world_size() == layout.world
    assert not experts or layout.world == layout.data, "experts, but tensor, pipe or sequence ranks too"
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
        model = _pipeline(parts, layout, tied)
    else:
        model = models.Language(parts, tied, experts)
    for piece, p in pieces(model, layout, experts, split=layout.kind != "autotp"):
        models.fill(p, piece)
    return model


def _by_hand(layout: Layout) -> Any:
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


def _pipeline(parts: Any, layout: Layout, tied: bool) -> Any:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

    topology = PipeDataParallelTopology(layout.pipe, layout.data)
    if layout.tensor > 1:
        topology = PipeModelDataParallelTopology(layout.pipe, layout.tensor, layout.data)
    return PipelineModule(
        models.pipeline_layers(parts, tied),
        topology=topology,
        loss_fn=models.cross_entropy,
        partition_method="type:Block",  # one that has only norms breaks BF16_Optimizer
    )


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


def bytes_of(held: dict[Piece, torch.Tensor]) -> dict[str, bytes]:
    """Of every piece that this rank holds, by its name."""
    return {str(piece): p.contiguous().view(torch.uint8).numpy().tobytes() for piece, p in held.items()}


def gathered(held: dict[Piece, torch.Tensor], replica: int) -> dict[str, NDArray[Any]]:
    """Whole weights: this rank's own pieces, the others from ranks of its replica."""
    mine = {piece: p.double().numpy() for piece, p in held.items()}
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, (replica, mine))
    found: dict[Piece, Any] = {}
    for theirs, other in all_ranks:
        if theirs == replica:
            found = {**other, **found}
    return models.assemble({**found, **mine})
