"""Which parameters the tensors of an optimizer's param group hold, and the group cut into tiles.

An optimizer steps on whole parameters, or on what an engine put in their place: float32 copies of them, or
this rank's partition of all of them in one flat tensor, whose ends lie anywhere in a parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.ops.segments import Segments, to_device


class Part(NamedTuple):
    """Consecutive elements of a param group's tensor that belong to one parameter."""

    tensor: int  # position in the group
    start: int
    length: int
    param: int  # position among the parameters


def _identity(sums_2P: Tensor) -> None:
    """All elements of all parameters are here: nothing to add."""


@dataclass(frozen=True)
class GroupLayout:
    """The P parameters of a param group, and which parts of them its tensors hold."""

    parts: Sequence[Part]  # by tensor and start; what lies between them is padding
    one_dimensional: Sequence[bool]  # whether each parameter has one dimension, or none
    counted: Sequence[bool]  # whether this rank's parts are added to the sums; of replicas one rank's are
    all_reduce: Callable[[Tensor], None] = _identity  # adds `[2, P]`, float64, over ranks in place
    spends_gradients: bool = False  # nobody reads them after a step, so updates may take their place
    is_in_turns: bool = False  # a param group's tensors are stepped on in turns, each in a call of its own

    @property
    def num_params(self) -> int:
        """P."""
        return len(self.one_dimensional)


def whole_parameters(params: Sequence[Tensor], shapes_of: Sequence[Tensor]) -> GroupLayout:
    """Every tensor is a parameter, with as many dimensions as the tensor in `shapes_of`."""
    parts = [Part(i, 0, p.numel(), i) for i, p in enumerate(params)]
    return GroupLayout(parts, [p.dim() <= 1 for p in shapes_of], [True] * len(parts))


@dataclass(frozen=True)
class Tile:
    """Some elements of a param group as one flat tensor of C columns."""

    runs: Sequence[tuple[int, int, int]]  # tensor, start and length, of one dtype on one device
    num_columns: int  # C
    params: Sequence[int]  # those that the columns belong to; P stands for padding
    params_S: Tensor  # the same
    segments: Segments  # which of them each column belongs to

    def is_view(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `load` gives a view."""
        return len(self.runs) == 1 and tensors[self.runs[0][0]].is_contiguous()

    def expand(self, values_P: Tensor) -> Tensor:
        """Values of parameters by column: `[C]`, or `[1]` where all columns have the same."""
        if len(self.params) == 1:
            return values_P.narrow(0, self.params[0], 1)
        return self.segments.expand(values_P[self.params_S][None])[0]

    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        """The elements, `[C]`: a view where they are consecutive, a copy otherwise."""
        if len(self.runs) == 1:
            return _run_of(tensors, *self.runs[0])
        return torch.cat([_run_of(tensors, *run) for run in self.runs])

    def store(self, tensors: Sequence[Tensor], values_C: Tensor) -> None:
        """Bring what `load` gave, and was changed in place, to where it is from; a view is there already."""
        if self.is_view(tensors) and values_C.dtype == tensors[self.runs[0][0]].dtype:
            return
        parts = values_C.split([length for *_, length in self.runs])
        for (tensor, start, length), part in zip(self.runs, parts, strict=True):
            target = tensors[tensor]
            if target.is_contiguous():
                _run_of(tensors, tensor, start, length).copy_(part)
            else:  # whole
                target.copy_(part.view(target.shape))


def _run_of(tensors: Sequence[Tensor], tensor: int, start: int, length: int) -> Tensor:
    return tensors[tensor].reshape(-1).narrow(0, start, length)


def tiles_of(
    layout: GroupLayout, tensors: Sequence[Tensor], present: Sequence[bool], size: int
) -> list[Tile]:
    """Cut tensors into tiles of about `size` elements; only those that are present.

    A tensor larger than a tile is cut, unless it is not contiguous; smaller ones share a tile.
    """
    tiles: list[Tile] = []
    runs: list[Part] = []
    filled = 0
    for run in _runs_of(layout, tensors, present, size):
        first = tensors[runs[0].tensor] if runs else tensors[run.tensor]
        same = (first.dtype, first.device) == (tensors[run.tensor].dtype, tensors[run.tensor].device)
        if runs and not (same and filled + run.length <= size):
            tiles.append(_tile(runs, first.device))
            runs, filled = [], 0
        runs.append(run)
        filled += run.length
    if runs:
        tiles.append(_tile(runs, tensors[runs[0].tensor].device))
    return tiles


def _runs_of(
    layout: GroupLayout, tensors: Sequence[Tensor], present: Sequence[bool], size: int
) -> Iterator[Part]:
    """Parts and the padding between them, none longer than `size` where it can be helped."""
    filled = [0] * len(tensors)
    padding = layout.num_params
    parts = list(layout.parts)
    ends = {part.tensor: part.start + part.length for part in parts}
    parts += [Part(i, ends.get(i, 0), t.numel() - ends.get(i, 0), padding) for i, t in enumerate(tensors)]
    for tensor, start, length, param in sorted(parts):
        if not present[tensor]:
            continue
        gap = start - filled[tensor]
        filled[tensor] = start + length
        for owner, begin, count in ((padding, start - gap, gap), (param, start, length)):
            step = size if tensors[tensor].is_contiguous() else max(count, 1)
            for at in range(begin, begin + count, step):
                yield Part(tensor, at, min(step, begin + count - at), owner)


def _tile(parts: Sequence[Part], device: torch.device) -> Tile:
    runs: list[tuple[int, int, int]] = []
    for tensor, start, length, _ in parts:
        if runs and runs[-1][0] == tensor and runs[-1][1] + runs[-1][2] == start:
            _, start, before = runs.pop()
            length += before
        runs.append((tensor, start, length))
    params = list(dict.fromkeys(part.param for part in parts))
    positions = {param: i for i, param in enumerate(params)}
    ids, lengths = [positions[part.param] for part in parts], [part.length for part in parts]
    params_S = to_device(torch.tensor(params), device)
    segments = Segments(ids, lengths, len(params), device)
    return Tile(runs, sum(lengths), params, params_S, segments)
