"""A bucket during its exchange: its tiles are sent, kept in its own memory, and results written to owners."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.exchange.bucket import CommDtypes
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.plan import ExchangePlan, Tile


class TiledBuffer:
    """One bucket during its exchange between the R ranks of W workers.

    The first sweep over the tiles communicates. It leaves all workers' gradients for this rank's region in
    the memory of the bucket (plan.py), and those of the last tile in a staging buffer; later sweeps read them
    from there. `write_result` overwrites a tile's gradients, so only the last sweep may call it.

    Memory: two staging buffers of one tile each, and a third where results travel in another dtype.

    Args:
        workers: who exchanges.
        flat_N: the bucket.
        plan: of its exchange.
        dtypes: in which numbers travel.
    """

    def __init__(self, workers: WorkerGroup, flat_N: Tensor, plan: ExchangePlan, dtypes: CommDtypes) -> None:
        self._workers = workers
        self._flat_N = flat_N
        self._tiles = plan.tiles
        self._replicated = plan.replicated
        self._dtypes = dtypes
        self._exchanged = False
        self._stashed: dict[int, Tensor | None] = {}  # None where it is in the bucket's memory
        self._outputs: dict[int, tuple[int, Tensor]] = {}
        self._allocate()

    def add_results_to(self, plan: ExchangePlan, outputs: list[Tensor]) -> None:
        """Add what is combined of each of `plan.owned` also to a tensor of its own."""
        owned = zip(plan.owned, outputs, strict=True)
        self._outputs = {piece.param: (piece.partition_offset, output) for piece, output in owned}

    def _allocate(self) -> None:
        workers, tiles = self._workers, self._tiles
        num_sent = max(max(sum(tile.sizes), sum(tile.received_from)) for tile in tiles)
        num_received = max(max(workers.receive_size(tile.sizes), sum(tile.received_from)) for tile in tiles)
        if self._replicated:
            num_received = max(num_received, *(workers.num_ranks * max(tile.sizes) for tile in tiles))
        self._outbox = self._flat_N.new_empty(num_sent, dtype=self._dtypes.gradient)
        self._inbox = self._flat_N.new_empty(num_received, dtype=self._dtypes.gradient)

    def suspend(self) -> None:
        """After a sweep that was not the last: keep only the bucket's memory and the last tile."""
        self._last_tile = self._received(len(self._tiles) - 1, self._inbox).clone()
        del self._outbox, self._inbox, self._flat_N

    def resume(self, flat_N: Tensor) -> None:
        """Go on where `suspend` stopped, with the bucket's contents as they were then."""
        self._flat_N = flat_N
        self._allocate()
        self._inbox[: self._last_tile.numel()] = self._last_tile
        del self._last_tile

    def sweep(self, last: bool = False) -> Iterator[tuple[int, Tensor]]:
        """All tiles in some order: the number of the tile and every worker's gradients `[W, C]`, not to be
        changed.

        With `last` nothing is kept for a later sweep, and the caller may write each tile's result when it is
        done with it.
        """
        if not self._exchanged:
            yield from self._exchange(keep=not last)
            self._exchanged = True
            return
        final = len(self._tiles) - 1
        yield final, self._received(final, self._inbox).view(self._workers.size, -1)
        for k in range(final):
            kept = self._received(k, self._outbox)
            places, parts = self._memory(k, kept)
            torch._foreach_copy_(parts, places)
            yield k, kept.view(self._workers.size, -1)

    def can_stash(self, num_rows: int) -> bool:
        """Whether a tile's memory in the bucket is enough for so many float32 a column."""
        return self._workers.num_ranks * self._flat_N.element_size() >= 4 * num_rows

    def stash(self, k: int, values_KC: Tensor) -> None:
        """Keep float32 numbers of tile k in place of its gradients; called during a sweep."""
        self._stashed[k] = values_KC
        if k < len(self._tiles) - 1:
            bits = values_KC.reshape(-1).view(self._flat_N.dtype)
            torch._foreach_copy_(*self._memory(k, bits))
            self._stashed[k] = None

    def stashed(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """What was stashed, tile by tile; the caller may write each tile's result when it is done with it."""
        for k in reversed(range(len(self._tiles))):
            values_KC = self._stashed[k]
            if values_KC is None:
                num_columns = self._tiles[k].num_columns
                bits = self._flat_N.new_empty(4 * num_rows * num_columns // self._flat_N.element_size())
                places, parts = self._memory(k, bits)
                torch._foreach_copy_(parts, places)
                values_KC = bits.view(torch.float32).view(num_rows, num_columns)
            yield k, values_KC

    def _memory(self, k: int, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of tile k's memory in the bucket, and as much of `values` for each of them."""
        places, parts, begin = [], [], 0
        for start, length in self._tiles[k].extents:
            length = min(length, values.numel() - begin)
            if length == 0:
                break
            places.append(self._flat_N.narrow(0, start, length))
            parts.append(values.narrow(0, begin, length))
            begin += length
        return places, parts

    def write_result(
        self,
        k: int,
        mean_C: Tensor,
        factors_C: Tensor | None = None,
        momentum: FactorMomentum | None = None,
    ) -> None:
        """Bring the combined gradients `factors * mean` of tile k, float32, to their owners' slices of the
        bucket; `mean_C` may be overwritten.
        """
        tile = self._tiles[k]
        if factors_C is not None and momentum is None:
            mean_C = mean_C.mul_(factors_C)
            factors_C = None
        if not tile.direct:
            mean_C = self._forward(tile, mean_C, self._inbox)
            if factors_C is not None:
                factors_C = self._forward(tile, factors_C, self._outbox)
        if not tile.owned and not self._replicated:
            return
        if factors_C is not None and momentum is not None and tile.owned:
            mean_C = mean_C * momentum.apply(tile.owned, factors_C)
        if self._replicated:
            self._gather(tile, mean_C)
            return
        lengths = [piece.length for piece in tile.owned]
        slices = [self._flat_N.narrow(0, piece.start, piece.length) for piece in tile.owned]
        torch._foreach_copy_(slices, list(mean_C.split(lengths)))
        if self._outputs:
            found = [(*self._outputs[piece.param], piece) for piece in tile.owned]
            sums = [
                out.narrow(0, piece.partition_offset - first, piece.length) for first, out, piece in found
            ]
            torch._foreach_add_(sums, list(mean_C.to(sums[0].dtype).split(lengths)))

    def _gather(self, tile: Tile, mean_C: Tensor) -> None:
        """Every rank's combined gradients to all of them, rounded alike, also this rank's own."""
        assert tile.direct  # what a rank combines of a tile is what it owns of it
        num_columns = max(tile.sizes)
        sent = self._outbox.new_zeros(num_columns)
        sent[: tile.num_columns] = mean_C
        received = self._inbox[: self._workers.num_ranks * num_columns]
        self._workers.gather(received, sent)
        parts = [
            part
            for row, rank in zip(received.view(-1, num_columns), tile.order, strict=True)
            for part in row[: tile.sizes[rank]].split([p.length for p in tile.regions[rank]])
        ]
        slices = [self._flat_N.narrow(0, start, length) for start, length in tile.extents]
        torch._foreach_copy_(slices, parts)

    def _exchange(self, keep: bool) -> Iterator[tuple[int, Tensor]]:
        for k, tile in enumerate(self._tiles):
            parts = [self._flat_N.narrow(0, start, length) for start, length in tile.extents]
            sent = torch.cat(parts, out=self._outbox[: sum(tile.sizes)])
            yield k, self._workers.exchange(sent, tile.sizes, self._inbox)
            if keep and k < len(self._tiles) - 1 and k not in self._stashed:
                torch._foreach_copy_(*self._memory(k, self._received(k, self._inbox)))

    def _received(self, k: int, buffer: Tensor) -> Tensor:
        """The part of a staging buffer that all workers' gradients for tile k take, one after the other."""
        return buffer[: self._workers.size * self._tiles[k].num_columns]

    def _forward(self, tile: Tile, values_C: Tensor, out: Tensor) -> Tensor:
        if out.dtype != self._dtypes.result:
            out = out.new_empty(sum(tile.received_from), dtype=self._dtypes.result)
        received = out[: sum(tile.received_from)]
        self._workers.all_to_all(received, values_C.to(out.dtype), tile.received_from, tile.sent_to)
        return received
