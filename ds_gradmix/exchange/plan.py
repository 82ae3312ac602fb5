"""Who combines which part of a bucket, and in which order: plain integers, decided alike on every rank.

A bucket of N elements is divided into R *regions*, one for each rank to combine. If its slices are spread
evenly over their owners, a rank's region is what it owns, and nothing needs to travel twice (`direct`). If
not, every region holds N/R elements, of its own rank's as many as fit, and combined gradients go on to their
owners in a second hop.

Regions are cut into tiles of equal width, tile k being columns `[k C, (k+1) C)` of all R regions. That makes
the exchange a transposition in place: the W <= R workers' gradients for tile k of *my* region take the memory
that tile k of all regions had, and the combined tile k belongs there too. So the bucket's own memory holds
everything, and only the tile at hand needs more. The last tile, whose parts may differ in length, stays in
the staging buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.ops.segments import Segments, to_device

_IMBALANCE = 1.25  # largest share of the busiest owner, in even shares, that goes to the owners directly


class Piece(NamedTuple):
    """Consecutive elements of a bucket with one owner, in one parameter."""

    start: int  # in the bucket
    length: int
    owner: int  # rank in the group
    param: int  # position among the parameters of the bucket
    group: int  # the optimizer's parameter group
    partition_offset: int  # where it begins in its owner's partition of that group

    def cut(self, begin: int, end: int) -> Piece:
        """The part `[begin, end)` of the piece."""
        return self._replace(
            start=self.start + begin, length=end - begin, partition_offset=self.partition_offset + begin
        )


@dataclass(frozen=True)
class Tile:
    """The same columns of all R regions, as one rank sees them."""

    regions: list[list[Piece]]  # of every rank, those of the tile
    rank: int
    direct: bool
    order: Sequence[int]  # the ranks as their regions are sent

    @cached_property
    def sizes(self) -> list[int]:
        """Elements each rank combines."""
        return [sum(piece.length for piece in region) for region in self.regions]

    @property
    def mine(self) -> list[Piece]:
        """What this rank combines."""
        return self.regions[self.rank]

    @property
    def num_columns(self) -> int:
        """How many elements this rank combines."""
        return self.sizes[self.rank]

    @cached_property
    def owned(self) -> list[Piece]:
        """What this rank owns, in the order in which the ranks that combine it send it."""
        return [piece for region in self.regions for piece in region if piece.owner == self.rank]

    @cached_property
    def sent_to(self) -> list[int]:
        """Combined elements that this rank sends to every owner."""
        return [sum(p.length for p in self.mine if p.owner == owner) for owner in range(len(self.regions))]

    @cached_property
    def received_from(self) -> list[int]:
        """Combined elements that this rank, as owner, gets from every rank."""
        return [sum(p.length for p in region if p.owner == self.rank) for region in self.regions]

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """`(start, length)` in the bucket of all R regions, in order."""
        return [(piece.start, piece.length) for rank in self.order for piece in self.regions[rank]]

    def segments(self, segment_of: Sequence[int], device: torch.device, num_rows: int) -> Segments:
        """Which segment each column belongs to, given that of every parameter of the bucket."""
        ids = [segment_of[piece.param] for piece in self.mine]
        num_segments = 1 if len(set(segment_of)) == 1 else 1 + max(segment_of)
        return Segments(ids, [piece.length for piece in self.mine], num_segments, device, num_rows)


@dataclass(frozen=True)
class ExchangePlan:
    """How one composition of a bucket is exchanged."""

    tiles: list[Tile]
    pieces: list[Piece]
    rank: int
    num_workers: int
    device: torch.device
    counted: list[bool]  # of every parameter of the bucket, whether this rank adds it to sums over the ranks
    replicated: bool  # whether every rank gets all of the result

    @cached_property
    def owned(self) -> list[Piece]:
        """What this rank owns of the bucket."""
        return [piece for piece in self.pieces if piece.owner == self.rank]

    @cached_property
    def num_elements(self) -> list[int]:
        """Elements of every parameter of the bucket that this rank counts."""
        numbers = [0] * len(self.counted)
        for piece in self.pieces:
            numbers[piece.param] += piece.length if self.counted[piece.param] else 0
        return numbers

    @cached_property
    def num_elements_P(self) -> Tensor:
        """The same, float64."""
        return to_device(torch.tensor(self.num_elements, dtype=torch.float64), self.device)

    @cached_property
    def by_param(self) -> list[Segments]:
        """Of every tile, one segment a parameter of the bucket."""
        return self._segments(list(range(len(self.counted))))

    @cached_property
    def as_one(self) -> list[Segments]:
        """Of every tile, all of it as one segment."""
        return self._segments([0] * len(self.counted))

    @cached_property
    def counted_as_one(self) -> list[Segments]:
        """Of every tile, one segment of what is counted; and one of what is not, where there is such."""
        return self._segments([int(not counted) for counted in self.counted])

    @cached_property
    def counted_P(self) -> Tensor | None:
        """1 or 0 for every parameter of the bucket, float64; None if all are counted."""
        if all(self.counted):
            return None
        return to_device(torch.tensor(self.counted, dtype=torch.float64), self.device)

    def _segments(self, segment_of: list[int]) -> list[Segments]:
        return [tile.segments(segment_of, self.device, self.num_workers) for tile in self.tiles]


def even_sizes(total: int, num_ranks: int) -> list[int]:
    """So many elements in shares that differ by one at most."""
    return [total // num_ranks + (rank < total % num_ranks) for rank in range(num_ranks)]


def share_evenly(lengths: Sequence[tuple[int, int]], num_ranks: int, group: int) -> list[Piece]:
    """A bucket that nobody owns, in equal shares, of which each rank takes one: its pieces, in order.

    Args:
        lengths: where each parameter's gradient begins in the bucket, and its elements.
        num_ranks: how many share.
        group: what distinguishes this bucket from others, for state that is kept of it.
    """
    sizes = even_sizes(sum(length for _, length in lengths), num_ranks)
    pieces: list[Piece] = []
    owner, partition_offset = 0, 0
    for param, (start, length) in enumerate(lengths):
        done = 0
        while done < length:
            while partition_offset == sizes[owner]:
                owner, partition_offset = owner + 1, 0
            part = min(length - done, sizes[owner] - partition_offset)
            pieces.append(Piece(start + done, part, owner, param, group, partition_offset))
            done, partition_offset = done + part, partition_offset + part
    return pieces


def plan_tiles(pieces: Sequence[Piece], order: Sequence[int], rank: int, columns: int) -> list[Tile]:
    """Divide a bucket among R ranks and into tiles of at most about `columns` elements a rank.

    Args:
        pieces: the whole bucket, in order of `start`.
        order: the ranks, as their regions are sent.
        rank: whose view to give.
        columns: C, at least 1.
    """
    regions, direct = _regions(pieces, len(order), columns)
    sizes = [sum(piece.length for piece in region) for region in regions]
    if max(sizes) == 0:
        return []
    if direct:
        columns = max(columns * 4 // 5, 1)  # leaves room for the last tile, which is as uneven as the owners
    num_full = min(-(-max(sizes) // columns) - 1, min(sizes) // columns)
    edges = [k * columns for k in range(num_full + 1)] + [max(sizes)]
    cuts = [_cut(region, edges) for region in regions]
    return [Tile([cut[k] for cut in cuts], rank, direct, order) for k in range(num_full + 1)]


def _regions(pieces: Sequence[Piece], num_ranks: int, columns: int) -> tuple[list[list[Piece]], bool]:
    owned = [0] * num_ranks
    for piece in pieces:
        owned[piece.owner] += piece.length
    total = sum(owned)
    if num_ranks * max(owned) <= _IMBALANCE * total and max(owned) - min(owned) <= columns // 5:
        room = owned
    else:
        room = even_sizes(total, num_ranks)
    free = list(room)
    regions: list[list[Piece]] = [[] for _ in range(num_ranks)]
    rest: list[Piece] = []
    for piece in pieces:
        fits = min(piece.length, free[piece.owner])
        if fits:
            regions[piece.owner].append(piece.cut(0, fits))
            free[piece.owner] -= fits
        if fits < piece.length:
            rest.append(piece.cut(fits, piece.length))
    taker = 0
    for piece in rest:
        begin = 0
        while begin < piece.length:
            if not free[taker]:
                taker += 1
                continue
            end = min(piece.length, begin + free[taker])
            regions[taker].append(piece.cut(begin, end))
            free[taker] -= end - begin
            begin = end
    for region in regions:
        region.sort(
            key=lambda piece: (piece.owner, piece.start)
        )  # the second hop sends in order of the owners
    return regions, not rest


def _cut(region: Sequence[Piece], edges: Sequence[int]) -> list[list[Piece]]:
    """The region's pieces between consecutive edges, which start at 0 and grow."""
    tiles: list[list[Piece]] = [[] for _ in edges[1:]]
    place, tile = 0, 0
    for piece in region:
        begin = 0
        while begin < piece.length:
            while place >= edges[tile + 1]:
                tile += 1
            end = min(piece.length, begin + edges[tile + 1] - place)
            tiles[tile].append(piece.cut(begin, end))
            place += end - begin
            begin = end
    return tiles
