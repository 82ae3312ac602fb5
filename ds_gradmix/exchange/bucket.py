"""What the reduction works on, as one value: a bucket of gradients that DeepSpeed was about to reduce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import TiedParameter
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.exchange.plan import Piece


class ParamSpan(NamedTuple):
    """Where a parameter's gradient lies in a bucket."""

    param: int  # position among the optimizer's parameters
    start: int
    length: int

    def of(self, flat_N: Tensor) -> Tensor:
        """The gradient, as a view."""
        return flat_N.narrow(0, self.start, self.length)


class ParamInfo(NamedTuple):
    """What the rules need to know of a parameter."""

    name: str
    draw: int  # which of the draws by parameter is its own: the same wherever in the model it lies
    counted: bool = True  # whether this rank adds it to inner products; of replicas exactly one does
    partitioned: bool = False  # whether tensor-parallel ranks hold different parts of it
    weight_sum: float = 1.0  # what its workers' weights sum to, relative to the other parameters


class ParamTable(NamedTuple):
    """The parameters of an optimizer, known by their position."""

    infos: Sequence[ParamInfo]
    device: torch.device
    layout: int  # a fingerprint of where parameters lie, which all saved state depends on
    names: Sequence[str] = ()  # of all of the model's, wherever in it; `ParamInfo.draw` is a place among them
    partition_sizes: Sequence[int] = ()  # elements this rank owns in each of the optimizer's groups
    tied: Sequence[tuple[int, TiedParameter]] = ()  # that several pipeline stages keep


class CommDtypes(NamedTuple):
    """The communication dtypes."""

    gradient: torch.dtype  # of gradients, sent to the ranks that combine them
    result: torch.dtype  # of combined gradients, sent from these to the owners

    @property
    def num_bytes(self) -> int:
        """What an element takes in the staging buffers of a tile, sent and received."""
        return 2 * self.gradient.itemsize + (self.result.itemsize if self.result != self.gradient else 0)


@dataclass(frozen=True)
class Bucket:
    """Gradients that one group of workers reduces together."""

    tensors: Sequence[Tensor]  # the memory that holds them, one tensor after the other
    spans: tuple[ParamSpan, ...]
    workers: WorkerGroup
    dtypes: CommDtypes
    replay: Callable[[], object]  # DeepSpeed's own reduction of them
    sum: Callable[[Tensor], object]  # sums what `load` gave over the workers, where weights replace averaging
    # Which rank owns which part of some of the spans; None where every rank needs all of the result.
    pieces: Callable[[Sequence[ParamSpan]], Sequence[Piece]] | None = None
    outputs: Sequence[tuple[int, Tensor]] = ()  # what owned pieces are also added to, by start in the bucket
    observed_scale: float = 1.0  # by which observed gradients are multiplied, to be as those of other buckets

    def load(self) -> Tensor:
        """The gradients as one flat tensor: a view where they are one, a copy where they are several."""
        if len(self.tensors) == 1:
            return self.tensors[0].reshape(-1)
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])

    def views(self, spans: Sequence[ParamSpan]) -> list[Tensor]:
        """The gradients of some of the spans as flat views, one after the other."""
        runs, views, begin = runs_of(spans), [], 0
        for tensor in self.tensors:
            flat_N, end = tensor.reshape(-1), begin + tensor.numel()
            for start, length, _ in runs:
                first, last = max(start, begin), min(start + length, end)
                if first < last:
                    views.append(flat_N[first - begin : last - begin])
            begin = end
        return views

    def store(self, flat_N: Tensor) -> None:
        """Bring a flat tensor that `load` gave back to where the gradients are."""
        if flat_N.data_ptr() == self.tensors[0].data_ptr():
            return
        for tensor, part in zip(self.tensors, flat_N.split([t.numel() for t in self.tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def runs_of(spans: Sequence[ParamSpan]) -> list[tuple[int, int, list[ParamSpan]]]:
    """Runs of spans without a gap between them: start, length, and the spans."""
    runs: list[list[ParamSpan]] = []
    for span in spans:
        if not runs or runs[-1][-1].start + runs[-1][-1].length != span.start:
            runs.append([])
        runs[-1].append(span)
    return [(run[0].start, sum(span.length for span in run), run) for run in runs]
