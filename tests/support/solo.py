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

from ds_gradmix.comm.workers import ParallelGroups, WorkerGroup, WorkerLevels
from ds_gradmix.config import parse_block
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamInfo, ParamSpan, ParamTable
from ds_gradmix.exchange.plan import Piece
from ds_gradmix.exchange.reducer import GradientReducer
from ds_gradmix.rules import RngKey
from tests.support.outside_rules import MODULE

GAF = {"mixing": {"type": "GAF"}}
VRGD = {"scaling": {"type": "VRGD"}}
BLOCKS: dict[str, dict[str, Any]] = {
    "gaf": GAF,
    "gaf by parameter": {**GAF, "scope": "parameter"},
    "vrgd": VRGD,
    "gaf vrgd by parameter": {**GAF, **VRGD, "scope": "parameter"},
    "momentum": {"scaling": {"type": "VRGD", "params": {"momentum": 0.9}}},
    "gaf drop": {**GAF, "nonfinite": "drop"},
    "gaf sketch": {**GAF, "gram": {"sketch": 2048}},
    "gaf sketch by parameter": {**GAF, "gram": {"sketch": 2048}, "scope": "parameter"},
    "gaf sketch summed": {**GAF, "gram": {"sketch": 2048}, "transport": "exchange"},
    "mean summed": {"transport": "exchange"},
    "gradientmix": {"mixing": {"type": "GradientMix"}},
    "gradientmix drop": {"mixing": {"type": "GradientMix"}, "nonfinite": "drop"},
    "gradientmix by parameter": {"mixing": {"type": "GradientMix", "params": {"granularity": "parameter"}}},
    "gradientmix by parameter vrgd": {
        "mixing": {"type": "GradientMix", "params": {"granularity": "parameter"}},
        **VRGD,
    },
    "andmask": {"scaling": {"type": "AndMask"}},
    "trust spread": {"mixing": {"type": f"{MODULE}:Trust"}, "scaling": {"type": f"{MODULE}:Spread"}},
}
OWNERS = {"one owner": [0] * 8, "other owner": [2] * 8, "even": [3, 3, 2, 2, 1, 1, 0, 0]}


class SoloWorkers(WorkerGroup):
    """Rank 0 of `size`, of which `per_worker` make one worker, alone."""

    def __init__(self, size: int, per_worker: int = 1) -> None:
        self.group = None
        self.ranks = tuple(range(size))
        self.num_ranks, self.rank = size, 0
        levels = None
        if per_worker > 1:
            levels = WorkerLevels(SoloWorkers(per_worker), SoloWorkers(size // per_worker), per_worker)
        self._split(levels, None)

    def all_to_all(self, out: Tensor, sent: Tensor, out_sizes: list[int], sent_sizes: list[int]) -> None:
        assert out.numel() == sum(out_sizes) and sent.numel() == sum(sent_sizes)
        begin = 0
        for size in out_sizes:
            part = out[begin : begin + size]
            part.copy_(sent[: part.numel()] if sent.numel() >= part.numel() else torch.ones_like(part))
            begin += size

    def begin_all_to_all(self, *arguments: Any) -> Any:
        self.all_to_all(*arguments)
        return lambda: None

    def reduce(self, values: Tensor) -> None:
        pass

    def broadcast(self, values: Tensor) -> None:
        pass

    def all_reduce(self, values: Tensor) -> None:
        pass

    def all_gather(self, out: Tensor, sent: Tensor) -> None:
        out.view(self.num_ranks, -1).copy_(sent)


def spans_of(lengths: list[int]) -> tuple[ParamSpan, ...]:
    """Gradients that lie one after the other in a bucket."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(ParamSpan(i, start, n) for i, (start, n) in enumerate(zip(starts, lengths, strict=True)))


class NoCheck:
    """Ranks that are always at the same point."""

    def check_equal(self, *_: Any) -> None:
        pass


def reducer_of(
    block: dict[str, Any], workers: WorkerGroup, num_params: int, partition: int, model: Any = None
) -> GradientReducer:
    """The reduction of gradients over workers that are all there is; this rank owns `partition` elements."""
    infos = [ParamInfo(f"p{i}", i) for i in range(num_params)]
    parallel = ParallelGroups(workers, model or workers, NoCheck(), None, None, False, {}, (), False)  # type: ignore[arg-type]
    params = ParamTable(infos, torch.device("cpu"), 0, partition_sizes=[partition])
    return GradientReducer(parse_block(block), parallel, params)


def bucket_of(
    flat_N: Tensor, spans: tuple[ParamSpan, ...], workers: WorkerGroup, pieces: list[Piece] | None
) -> Bucket:
    """A bucket with owners, or without."""
    owners = None if pieces is None else lambda _: pieces
    dtypes = CommDtypes(flat_N.dtype, flat_N.dtype)
    return Bucket([flat_N], spans, workers, dtypes, lambda: None, lambda _: None, owners)


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
    pieces, start, offsets = [], 0, [0] * size
    for param, (length, owner) in enumerate(zip(lengths, owners, strict=True)):
        pieces.append(Piece(start, length, owner, param, 0, offsets[owner]))
        start, offsets[owner] = start + length, offsets[owner] + length
    workers = SoloWorkers(size, per_worker)
    reducer = reducer_of(block, workers, len(lengths), offsets[0])
    _reduce(reducer, bucket_of(flat_N, spans_of(lengths), workers, pieces), 1 + warm_up, around)


def share_bucket(
    block: dict[str, Any],
    lengths: list[int],
    flat_N: Tensor,
    size: int = 4,
    around: Any = None,
    per_worker: int = 1,
) -> None:
    """The same where nobody owns the bucket, and every rank is to have all of the result."""
    workers = SoloWorkers(size, per_worker)
    reducer = reducer_of(block, workers, len(lengths), 0)
    _reduce(reducer, bucket_of(flat_N, spans_of(lengths), workers, None), 2, around)


def _reduce(reducer: GradientReducer, bucket: Bucket, times: int, around: Any) -> None:
    for final in [False] * (times - 1) + [True]:
        with around if final else nullcontext():
            reducer.reduce(bucket, RngKey(reducer.config.seed, 0), last=True)


class Launches(TorchDispatchMode):
    """Counts operations that would be kernels on a GPU."""

    VIEWS = ("select", "unsqueeze", "slice", "diagonal", "detach", "alias", "expand", "view", "lift_fresh")
    # A number as an argument, and memory, are none either.
    VIEWS += ("_unsafe_view", "split", "scalar_tensor", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


def _waits(_: Tensor) -> Any:
    raise AssertionError("tolist makes the host wait for the device")


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations for which the host has to wait for the device."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __enter__(self) -> Any:
        self._tolist, torch.Tensor.tolist = torch.Tensor.tolist, _waits  # on a CPU it dispatches nothing
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist
        super().__exit__(*error)

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
