"""One process that plays all workers of an exchange: collectives answer as if every other rank had the same
tensors.

For what a real group cannot show: which operations the reduction path uses, and what memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_gradmix.comm.workers import WorkerGroup, WorkerLevels
from ds_gradmix.config import parse_block
from ds_gradmix.exchange.plan import Piece, share_evenly
from ds_gradmix.exchange.reducer import ParamSpan, Reduction, parameters_of
from ds_gradmix.exchange.steps import Steps
from ds_gradmix.exchange.tiled_buffer import CommDtypes


class SoloWorkers(WorkerGroup):
    """Rank 0 of `size`, of which `per_worker` make one worker, alone."""

    def __init__(self, size: int, per_worker: int = 1) -> None:
        self.num_ranks, self.rank, self.team = size, 0, None
        self.decision_group = self
        if per_worker > 1:
            self.team = WorkerLevels(SoloWorkers(per_worker), SoloWorkers(size // per_worker), per_worker)

    def all_to_all(self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]) -> None:
        assert out.numel() == sum(out_sizes) and sent.numel() == sum(sent_sizes)
        begin = 0
        for size in out_sizes:
            part = out[begin : begin + size]
            part.copy_(sent[: part.numel()] if sent.numel() >= part.numel() else torch.ones_like(part))
            begin += size

    def reduce_to_first(self, values: Tensor) -> None:
        pass

    def broadcast_from_first(self, values: Tensor) -> None:
        pass

    def sum(self, values: Tensor) -> None:
        pass

    def all_gather(self, out: Tensor, sent: Tensor) -> None:
        out.view(self.num_ranks, -1).copy_(sent)


def spans_of(lengths: list[int]) -> tuple[ParamSpan, ...]:
    """Gradients that lie one after the other in a bucket."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(ParamSpan(i, start, n) for i, (start, n) in enumerate(zip(starts, lengths, strict=True)))


def reduce_bucket(
    block: dict[str, Any],
    lengths: list[int],
    owners: list[int],
    flat_N: Tensor,
    size: int = 4,
    warm_up: bool = True,
    around: Any = None,
    per_worker: int = 1,
) -> None:
    """One reduction of a bucket, within the context manager `around`; a first one plans and allocates."""
    pieces, start, homes = [], 0, [0] * size
    for parameter, (length, owner) in enumerate(zip(lengths, owners, strict=True)):
        pieces.append(Piece(start, length, owner, parameter, 0, homes[owner]))
        start, homes[owner] = start + length, homes[owner] + length
    workers = SoloWorkers(size, per_worker)
    _reduce(block, spans_of(lengths), pieces, flat_N, workers, 1 + warm_up, around, whole=False)


def share_bucket(
    block: dict[str, Any],
    lengths: list[int],
    flat_N: Tensor,
    size: int = 4,
    around: Any = None,
    per_worker: int = 1,
) -> None:
    """The same where nobody owns the bucket, and every rank is to have all of the result."""
    spans = spans_of(lengths)
    pieces = share_evenly([(span.start, span.length) for span in spans], size, 0)
    _reduce(block, spans, pieces, flat_N, SoloWorkers(size, per_worker), 2, around, whole=True)


def _reduce(
    block: dict[str, Any],
    spans: tuple[ParamSpan, ...],
    pieces: list[Piece],
    flat_N: Tensor,
    workers: SoloWorkers,
    times: int,
    around: Any,
    whole: bool,
) -> None:
    rules = parse_block(block)
    owned = sum(piece.length for piece in pieces if piece.owner == 0)
    steps = Steps(rules, workers, workers, [owned], flat_N.device)
    parameters = parameters_of([str(span.parameter) for span in spans])
    reduction = Reduction(rules, workers, steps, parameters, flat_N.device)
    for final in [False] * (times - 1) + [True]:
        with around if final else nullcontext():
            if reduction.exchanges:
                wire = CommDtypes(flat_N.dtype, flat_N.dtype)
                reduction.exchange(flat_N, spans, lambda: pieces, wire, whole=whole)
            else:
                reduction.weigh(flat_N, spans)


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations for which the host has to wait for the device."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAIT, f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Most bytes of new tensors alive at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._old: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                address = tensor.untyped_storage()._cdata
                if address not in self._alive:
                    self._old.add(address)
        out = func(*args, **(kwargs or {}))
        self._alive = {a: (ref, size) for a, (ref, size) in self._alive.items() if not ref.expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._old:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out
