"""A bucket on its way: the tiles of its exchange, sent, kept in the bucket's own memory, and placed with
their owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.plan import Piece, Tile


class CommDtypes(NamedTuple):
    """How numbers travel."""

    gradient: torch.dtype  # to those who combine
    result: torch.dtype  # from them to the owners

    @property
    def num_bytes(self) -> int:
        """What an element takes in the staging buffers of a tile, sent and received."""
        return 2 * self.gradient.itemsize + (self.result.itemsize if self.result != self.gradient else 0)


class TiledBuffer:
    """One bucket during its reduction, between the R ranks of W workers.

    The first sweep over the tiles communicates; it leaves all workers' gradients for this rank's region in
    the memory of the bucket (layout.py), the last tile in a staging buffer, and later sweeps read them from
    there. After `place` a tile's gradients are gone, since the result takes their memory; so only the last
    sweep may place.

    With `whole`, regions are what ranks own, and every rank gets all of the result. With `last_tile`, what
    another transit's `interrupt` gave, this one goes on where that one stopped.

    Memory: two staging buffers of one tile each, and a third where results travel in another dtype.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        flat_N: Tensor,
        tiles: Sequence[Tile],
        wire: CommDtypes,
        outputs: Sequence[tuple[Piece, Tensor]] = (),
        *,
        whole: bool = False,
        last_tile: Tensor | None = None,
    ) -> None:
        self._workers = workers
        self._flat_N = flat_N
        self._tiles = tiles
        self._exchanged = last_tile is not None
        self._held: dict[int, Tensor | None] = {}  # None where it is in the bucket's memory
        self._whole = whole
        num_sent = max(max(sum(tile.sizes), sum(tile.received_from)) for tile in tiles)
        num_received = max(max(workers.receive_size(tile.sizes), sum(tile.received_from)) for tile in tiles)
        if whole:
            num_received = max(num_received, *(workers.num_ranks * max(tile.sizes) for tile in tiles))
        self._wire = wire
        self._outbox = flat_N.new_empty(num_sent, dtype=wire.gradient)
        self._inbox = flat_N.new_empty(num_received, dtype=wire.gradient)
        if last_tile is not None:
            self._inbox[: last_tile.numel()] = last_tile
        self._outputs = {piece.parameter: (piece.home, output) for piece, output in outputs}

    def sweep(self, last: bool = False) -> Iterator[tuple[int, Tensor]]:
        """All tiles in some order: the number of the tile and every worker's gradients `[W, C]`, not to be
        changed.

        With `last` nothing is kept for a later sweep, and the caller may place each tile when it is done with
        it.
        """
        if not self._exchanged:
            yield from self._exchange(keep=not last)
            self._exchanged = True
            return
        final = len(self._tiles) - 1
        yield final, self._received(final, self._inbox).view(self._workers.size, -1)
        for k in range(final):
            kept = self._received(k, self._outbox)
            places, parts = self._home(k, kept)
            torch._foreach_copy_(parts, places)
            yield k, kept.view(self._workers.size, -1)

    def interrupt(self) -> Tensor:
        """After a sweep that was not the last: what is not in the bucket's memory, the last tile."""
        return self._received(len(self._tiles) - 1, self._inbox).clone()

    @property
    def holds_signals(self) -> bool:
        """Whether a tile's memory in the bucket is enough for two float32 a column."""
        return self._workers.num_ranks * self._flat_N.element_size() >= 8

    def hold(self, k: int, signal: Tensor) -> None:
        """Keep tile k's statistics, float32, in place of its gradients; called during a sweep."""
        self._held[k] = signal
        if k < len(self._tiles) - 1:
            bits = signal.reshape(-1).view(self._flat_N.dtype)
            torch._foreach_copy_(*self._home(k, bits))
            self._held[k] = None

    def held(self) -> Iterator[tuple[int, Tensor]]:
        """What was held, tile by tile; the caller may place each when it is done with it."""
        for k in reversed(range(len(self._tiles))):
            signal = self._held[k]
            if signal is None:
                num_columns = self._tiles[k].num_columns
                bits = self._flat_N.new_empty(8 * num_columns // self._flat_N.element_size())
                places, parts = self._home(k, bits)
                torch._foreach_copy_(parts, places)
                signal = bits.view(torch.float32).view(2, num_columns)
            yield k, signal

    def _home(self, k: int, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of tile k's memory in the bucket, and as much of `values` for each of them."""
        places, parts, begin = [], [], 0
        for start, length in self._tiles[k].spans:
            length = min(length, values.numel() - begin)
            if length == 0:
                break
            places.append(self._flat_N.narrow(0, start, length))
            parts.append(values.narrow(0, begin, length))
            begin += length
        return places, parts

    def place(
        self, k: int, mean_C: Tensor, factors_C: Tensor | None = None, smoothing: FactorMomentum | None = None
    ) -> None:
        """Bring combined gradients `factors * mean` of tile k, float32, to their owners' slices of the
        bucket.
        """
        tile = self._tiles[k]
        if factors_C is not None and smoothing is None:
            mean_C = mean_C.mul_(factors_C)
            factors_C = None
        if not tile.direct:
            mean_C = self._forward(tile, mean_C, self._inbox)
            if factors_C is not None:
                factors_C = self._forward(tile, factors_C, self._outbox)
        if not tile.placed and not self._whole:
            return
        if factors_C is not None and smoothing is not None and tile.placed:
            mean_C = mean_C * smoothing.apply(tile.placed, factors_C)
        if self._whole:
            self._spread(tile, mean_C)
            return
        lengths = [piece.length for piece in tile.placed]
        slices = [self._flat_N.narrow(0, piece.start, piece.length) for piece in tile.placed]
        torch._foreach_copy_(slices, list(mean_C.split(lengths)))
        if self._outputs:
            homes = [(*self._outputs[piece.parameter], piece) for piece in tile.placed]
            sums = [output.narrow(0, piece.home - home, piece.length) for home, output, piece in homes]
            torch._foreach_add_(sums, list(mean_C.to(sums[0].dtype).split(lengths)))

    def _spread(self, tile: Tile, mean_C: Tensor) -> None:
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
        slices = [self._flat_N.narrow(0, start, length) for start, length in tile.spans]
        torch._foreach_copy_(slices, parts)

    def _exchange(self, keep: bool) -> Iterator[tuple[int, Tensor]]:
        for k, tile in enumerate(self._tiles):
            parts = [self._flat_N.narrow(0, start, length) for start, length in tile.spans]
            sent = torch.cat(parts, out=self._outbox[: sum(tile.sizes)])
            yield k, self._workers.exchange(sent, tile.sizes, self._inbox)
            if keep and k < len(self._tiles) - 1 and k not in self._held:
                torch._foreach_copy_(*self._home(k, self._received(k, self._inbox)))

    def _received(self, k: int, buffer: Tensor) -> Tensor:
        """The part of a staging buffer that all workers' gradients for tile k take, one after the other."""
        return buffer[: self._workers.size * self._tiles[k].num_columns]

    def _forward(self, tile: Tile, values_C: Tensor, out: Tensor) -> Tensor:
        if out.dtype != self._wire.result:
            out = out.new_empty(sum(tile.received_from), dtype=self._wire.result)
        received = out[: sum(tile.received_from)]
        self._workers.all_to_all(received, values_C.to(out.dtype), tile.received_from, tile.sent_to)
        return received
