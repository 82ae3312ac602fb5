"""A bucket during its exchange: its tiles are sent, kept in its own memory, and results written to owners."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.workers import Merge, WorkerGroup
from ds_gradmix.exchange.bucket import Bucket
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.plan import ExchangePlan, Piece, Tile


class Staging(NamedTuple):
    """Memory for a tile on its way."""

    outbox: Tensor
    inbox: Tensor


class TiledBuffer:
    """One bucket during its exchange between the R ranks of W workers.

    The first sweep over the tiles communicates. It leaves all workers' gradients for this rank's region in
    the memory of the bucket (plan.py), and those of the last tile in a staging buffer; later sweeps read them
    from there. `write_result` overwrites a tile's gradients, so only the last sweep may call it.

    Memory: two staging buffers of one tile each, and a third where results have another dtype. Where workers
    have several ranks there are two of each: the next tile is exchanged inside of workers while this one is
    between them.
    """

    def __init__(
        self, workers: WorkerGroup, bucket: Bucket, plan: ExchangePlan, momentum: FactorMomentum | None
    ) -> None:
        self.flat_N = bucket.load()
        self._workers = workers
        self._bucket = bucket
        self._momentum = momentum
        self._tiles = plan.tiles
        self._final = len(plan.tiles) - 1
        self._exchanged = False
        self._suspended: Tensor | None = None  # the last tile, from `suspend` to `resume`
        self._stashed: Tensor | None = None  # of the last tile; those of the others are in the bucket
        starts = dict(bucket.outputs)
        self._outputs = {p.param: (p.start, starts[p.start]) for p in plan.owned} if starts else {}
        self._allocate()

    def _allocate(self) -> None:
        workers, tiles = self._workers, self._tiles
        num_sent = max((max(sum(tile.sizes), sum(tile.received_from)) for tile in tiles), default=0)
        received = [(workers.receive_size(tile.sizes), sum(tile.received_from)) for tile in tiles]
        if self._bucket.pieces is None:
            received += [(workers.num_ranks * max(tile.sizes), 0) for tile in tiles]
        num_received = max(map(max, received), default=0)
        dtype, ahead = self._bucket.dtypes.gradient, 1 if workers.levels is None else min(2, len(tiles))
        sizes = (num_sent, num_received)
        self._boxes = [Staging(*(self.flat_N.new_empty(n, dtype=dtype) for n in sizes)) for _ in range(ahead)]
        self._box = next(
            iter(self._boxes), Staging(self.flat_N, self.flat_N)
        )  # of the tile at hand, or of the last one

    def suspend(self) -> None:
        """After a sweep that was not the last: keep only the bucket's memory and the last tile."""
        if self._tiles:
            self._suspended = self._received(self._final, self._box.inbox).clone()
            self._bucket.store(self.flat_N)
            self.release()

    def release(self) -> None:
        """Let go of the staging buffers, and of the gradients where they were copied."""
        del self._boxes, self._box, self.flat_N

    def resume(self) -> None:
        """Go on where `suspend` stopped, if it did."""
        if self._suspended is not None:
            self.flat_N = self._bucket.load()
            self._allocate()
            self._box.inbox[: self._suspended.numel()] = self._suspended
            self._suspended = None

    def sweep(self, last: bool = False, merges: Sequence[Merge] = ()) -> Iterator[tuple[int, Tensor]]:
        """All tiles in some order: the number of the tile and every worker's gradients `[W, C]`, not to be
        changed. With `last` nothing is kept for a later sweep, and the caller may stash numbers of each tile,
        or write its result, when it is done with it. `merges`, of every tile, are how a worker's ranks'
        gradients become one in the first sweep, if not by their mean.
        """
        if not self._exchanged:
            yield from self._exchange(merges or [None] * len(self._tiles), keep=not last)
            self._exchanged = True
            return
        inbox, outbox = self._box.inbox, self._box.outbox
        yield self._final, self._received(self._final, inbox).view(self._workers.size, -1)
        for k in range(self._final):
            yield k, self._read(k, self._received(k, outbox)).view(self._workers.size, -1)

    def can_stash(self, num_rows: int) -> bool:
        """Whether a tile's memory in the bucket is enough for so many float32 a column."""
        return self._workers.num_ranks * self.flat_N.element_size() >= 4 * num_rows

    def stash(self, k: int, values_KC: Tensor) -> None:
        """Keep float32 numbers of tile k in place of its gradients."""
        if k == self._final:
            self._stashed = values_KC
        else:
            torch._foreach_copy_(*self._memory(k, values_KC.reshape(-1).view(self.flat_N.dtype)))

    def stashed(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """What was stashed, tile by tile; the caller may write each tile's result when it is done with it."""
        assert self._stashed is not None
        yield self._final, self._stashed
        for k in reversed(range(self._final)):
            num_columns = self._tiles[k].num_columns
            bits = self.flat_N.new_empty(4 * num_rows * num_columns // self.flat_N.element_size())
            yield k, self._read(k, bits).view(torch.float32).view(num_rows, num_columns)

    def _memory(self, k: int, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of tile k's memory in the bucket, and as much of `values` for each of them."""
        places, parts, begin = [], [], 0
        for start, length in self._tiles[k].extents:
            length = min(length, values.numel() - begin)
            if length == 0:
                break
            places.append(self.flat_N.narrow(0, start, length))
            parts.append(values.narrow(0, begin, length))
            begin += length
        return places, parts

    def _read(self, k: int, out: Tensor) -> Tensor:
        places, parts = self._memory(k, out)
        torch._foreach_copy_(parts, places)
        return out

    def write_result(self, k: int, mean_C: Tensor, factors_C: Tensor | None = None) -> None:
        """Bring `factors * mean` of tile k, float32, to the owners' slices; `mean_C` may be overwritten."""
        tile, momentum = self._tiles[k], self._momentum
        if factors_C is not None and momentum is None:
            mean_C = mean_C.mul_(factors_C)
        if not tile.direct:
            mean_C = self._forward(tile, mean_C, self._box.inbox)
        if factors_C is not None and momentum is not None:
            if not tile.direct:
                factors_C = self._forward(tile, factors_C, self._box.outbox)
            if tile.owned:
                mean_C = mean_C * momentum.apply(tile.owned, factors_C)
        if self._bucket.pieces is None:
            self._gather(tile, mean_C)
        elif tile.owned:
            self._store(tile.owned, mean_C)

    def _store(self, owned: Sequence[Piece], mean_C: Tensor) -> None:
        lengths = [piece.length for piece in owned]
        slices = [self.flat_N.narrow(0, piece.start, piece.length) for piece in owned]
        torch._foreach_copy_(slices, list(mean_C.split(lengths)))
        if self._outputs:
            found = [(*self._outputs[piece.param], piece) for piece in owned]
            sums = [out.narrow(0, piece.start - start, piece.length) for start, out, piece in found]
            torch._foreach_add_(sums, list(mean_C.to(sums[0].dtype).split(lengths)))

    def _gather(self, tile: Tile, mean_C: Tensor) -> None:
        """Every rank's combined gradients to all of them, rounded equally, also this rank's own."""
        assert tile.direct  # what a rank combines of a tile is what it owns of it
        num_columns = max(tile.sizes)
        sent = self._box.outbox.new_zeros(num_columns)
        sent[: tile.num_columns] = mean_C
        received = self._box.inbox[: self._workers.num_ranks * num_columns]
        self._workers.gather(received, sent)
        parts = [
            part
            for row, rank in zip(received.view(-1, num_columns), tile.order, strict=True)
            for part in row[: tile.sizes[rank]].split([p.length for p in tile.regions[rank]])
        ]
        slices = [self.flat_N.narrow(0, start, length) for start, length in tile.extents]
        torch._foreach_copy_(slices, parts)

    def _exchange(self, merges: Sequence[Merge | None], keep: bool) -> Iterator[tuple[int, Tensor]]:
        under_way: list[Callable[[], Tensor]] = []
        for k in range(len(self._tiles)):
            ahead = min(k + len(self._boxes), len(self._tiles))
            under_way += [self._begin(j, merges[j]) for j in range(k + len(under_way), ahead)]
            self._box = self._boxes[k % len(self._boxes)]
            yield k, under_way.pop(0)()
            if keep and k < self._final:
                torch._foreach_copy_(*self._memory(k, self._received(k, self._box.inbox)))

    def _begin(self, k: int, merge: Merge | None) -> Callable[[], Tensor]:
        """Send a tile, from a staging buffer or from where it lies if that will do."""
        tile, (outbox, inbox) = self._tiles[k], self._boxes[k % len(self._boxes)]
        if tile.run is not None and self.flat_N.dtype == outbox.dtype:
            return self._workers.begin_exchange(self.flat_N.narrow(0, *tile.run), tile.sizes, inbox, merge)
        parts = [self.flat_N.narrow(0, start, length) for start, length in tile.extents]
        sent = torch.cat(parts, out=outbox[: sum(tile.sizes)])
        return self._workers.begin_exchange(sent, tile.sizes, inbox, merge)

    def _received(self, k: int, buffer: Tensor) -> Tensor:
        """The part of a staging buffer that all workers' gradients for tile k take, one after the other."""
        return buffer[: self._workers.size * self._tiles[k].num_columns]

    def _forward(self, tile: Tile, values_C: Tensor, out: Tensor) -> Tensor:
        """Send what this rank combined to its owners, and receive what it owns."""
        if out.dtype != self._bucket.dtypes.result:
            out = out.new_empty(sum(tile.received_from), dtype=self._bucket.dtypes.result)
        received = out[: sum(tile.received_from)]
        self._workers.all_to_all(received, values_C.to(out.dtype), tile.received_from, tile.sent_to)
        return received
