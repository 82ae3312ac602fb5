"""Who combines which part of a bucket, and in which order: plain integers, decided identically on every rank.

A bucket of N elements is divided into R *regions*, one for each rank to combine. If its slices are spread
evenly over their owners, a rank's region is what it owns, and nothing needs to be sent twice (`direct`). If
not, every region holds N/R elements, and combined gradients are sent to their owners in a second all-to-all.

Regions are cut into tiles of equal width: tile k is columns `[k C, (k+1) C)` of all R regions, or, where they
are not what ranks own, the k-th R C consecutive elements of the bucket. That makes the exchange a
transposition in place: the W <= R workers' gradients for tile k of *my* region take the memory that tile k
of all regions had, and the combined tile k belongs there too. So the bucket's own memory holds everything,
and only the tile at hand needs more. The last tile, whose parts may differ in length, stays in the staging
buffer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.config import GradmixConfig
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

    def cut(self, begin: int, end: int) -> "Piece":
        """The part `[begin, end)` of the piece."""
        offset = self.partition_offset + begin
        return self._replace(start=self.start + begin, length=end - begin, partition_offset=offset)


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
        return [_length(region) for region in self.regions]

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
        return [_length(p for p in self.mine if p.owner == owner) for owner in range(len(self.regions))]

    @cached_property
    def received_from(self) -> list[int]:
        """Combined elements that this rank, as owner, gets from every rank."""
        return [_length(p for p in region if p.owner == self.rank) for region in self.regions]

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """`(start, length)` where the tile lies in the bucket as it is sent, or None."""
        end = start = self.extents[0][0]
        for begin, length in self.extents:
            if begin != end:
                return None
            end = begin + length
        return start, end - start

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """`(start, length)` in the bucket of all R regions, in order."""
        return [(piece.start, piece.length) for rank in self.order for piece in self.regions[rank]]


@dataclass(frozen=True)
class ExchangePlan:
    """How one composition of a bucket is exchanged."""

    tiles: list[Tile]
    pieces: list[Piece]
    rank: int
    num_workers: int
    device: torch.device
    counted: list[bool]  # of every parameter of the bucket, whether this rank adds it to sums over the ranks
    ranks_per_worker: int = 1

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
        """The same on the device, float64."""
        return to_device(torch.tensor(self.num_elements, dtype=torch.float64), self.device)

    @cached_property
    def counted_P(self) -> Tensor | None:
        """1 or 0 for every parameter of the bucket, float64; None if all are counted."""
        if all(self.counted):
            return None
        return to_device(torch.tensor(self.counted, dtype=torch.float64), self.device)

    @cached_property
    def by_param(self) -> list[Segments]:
        """Of every tile, one segment a parameter of the bucket."""
        return self._segments(range(len(self.counted)))

    @cached_property
    def as_one(self) -> list[Segments]:
        """Of every tile, all of it as one segment."""
        return self._segments([0] * len(self.counted))

    @cached_property
    def counted_as_one(self) -> list[Segments]:
        """Of every tile, one segment of what is counted; and one of what is not, where there is such."""
        return self._segments([int(not counted) for counted in self.counted])

    @cached_property
    def place_by_param(self) -> list[Segments]:
        """The same of what this rank gets from its worker's ranks: the regions of all with its place."""
        return self._segments(range(len(self.counted)), self.ranks_per_worker)

    @cached_property
    def place_as_one(self) -> list[Segments]:
        """That as one segment."""
        return self._segments([0] * len(self.counted), self.ranks_per_worker)

    def _segments(self, segment_of: Sequence[int], every: int | None = None) -> list[Segments]:
        """Of every tile, which segment each column belongs to, given that of every parameter: of this rank's
        region, or of those of `every` so many ranks.
        """
        num_segments = 1 if len(set(segment_of)) == 1 else 1 + max(segment_of)
        made = []
        for tile in self.tiles:
            regions = [tile.mine] if every is None else tile.regions[self.rank % every :: every]
            pieces = [piece for region in regions for piece in region]
            ids, lengths = [segment_of[p.param] for p in pieces], [p.length for p in pieces]
            made.append(Segments(ids, lengths, num_segments, self.device, self.num_workers))
        return made


def even_sizes(total: int, num_ranks: int) -> list[int]:
    """So many elements in shares that differ by one at most."""
    return [total // num_ranks + (rank < total % num_ranks) for rank in range(num_ranks)]


def share_evenly(lengths: Sequence[tuple[int, int]], num_ranks: int, group: int) -> list[Piece]:
    """Equal shares of gradients `(start, length)` that nobody owns; `group` is that of their state."""
    grads = [Piece(start, length, 0, param, group, 0) for param, (start, length) in enumerate(lengths)]
    shares = _fill(grads, even_sizes(_length(grads), num_ranks))
    return [part._replace(owner=rank, partition_offset=offset) for part, rank, offset in shares]


def plan_tiles(pieces: Sequence[Piece], order: Sequence[int], rank: int, columns: int) -> list[Tile]:
    """Divide a bucket, given in order of `start`, among R ranks and into tiles of at most about `columns`
    elements a rank; `order` is that in which their regions are sent, and `rank` the one whose view to give.
    """
    owned = [_length(piece for piece in pieces if piece.owner == rank) for rank in range(len(order))]
    if max(owned) == 0:
        return []
    even = len(order) * max(owned) <= _IMBALANCE * sum(owned) and max(owned) - min(owned) <= columns // 5
    if not even and owned != even_sizes(sum(owned), len(order)):
        return [Tile(regions, rank, False, order) for regions in _spread(pieces, order, columns)]
    columns = max(columns * 4 // 5, 1)  # leaves room for the last tile, which is as uneven as the owners
    num_full = min(-(-max(owned) // columns) - 1, min(owned) // columns)
    widths = [columns] * num_full + [max(owned) - num_full * columns]
    tiles = [Tile([[] for _ in order], rank, True, order) for _ in widths]
    for owner in range(len(order)):
        for part, k, _ in _fill((piece for piece in pieces if piece.owner == owner), widths):
            tiles[k].regions[owner].append(part)
    return tiles


def _spread(pieces: Sequence[Piece], order: Sequence[int], columns: int) -> Iterator[list[list[Piece]]]:
    """What every rank combines of each tile, in equal shares of consecutive elements.

    A tile with one owner lies in the bucket as it is sent. Where it has several, each of them combines as
    much of its own as its share holds.
    """
    width, total = len(order) * columns, _length(pieces)
    widths = [width] * (-(-total // width) - 1)
    tiles: list[list[Piece]] = [[] for _ in range(len(widths) + 1)]
    for part, k, _ in _fill(pieces, [*widths, total - sum(widths)]):
        tiles[k].append(part)
    for tile in tiles:
        regions: list[list[Piece]] = [[] for _ in order]
        free, rest = even_sizes(_length(tile), len(order)), tile
        if len({piece.owner for piece in tile}) > 1:
            rest = _keep_own(tile, regions, free)
        for part, place, _ in _fill(rest, [free[rank] for rank in order]):
            regions[order[place]].append(part)
        for region in regions:
            region.sort(key=lambda piece: (piece.owner, piece.start))  # combined gradients are sent by owner
        yield regions


def _keep_own(pieces: Sequence[Piece], regions: list[list[Piece]], free: list[int]) -> list[Piece]:
    """Give each owner as much of its own as it has free; the rest."""
    rest = []
    for piece in pieces:
        fits = min(piece.length, free[piece.owner])
        if fits:
            regions[piece.owner].append(piece.cut(0, fits))
            free[piece.owner] -= fits
        if fits < piece.length:
            rest.append(piece.cut(fits, piece.length))
    return rest


def _fill(pieces: Iterable[Piece], sizes: Sequence[int]) -> Iterator[tuple[Piece, int, int]]:
    """Cut pieces to fill bins of these sizes in turn: every part, the number of its bin, its place there."""
    number, used = 0, 0
    for piece in pieces:
        begin = 0
        while begin < piece.length:
            while used == sizes[number]:
                number, used = number + 1, 0
            end = min(piece.length, begin + sizes[number] - used)
            yield piece.cut(begin, end), number, used
            begin, used = end, used + end - begin


def _length(pieces: Iterable[Piece]) -> int:
    return sum(piece.length for piece in pieces)


def columns_per_tile(
    config: GradmixConfig, num_ranks: int, num_workers: int, comm_bytes: int, *, by_node: bool = False
) -> int:
    """Elements a rank combines at a time, such that 3 `tile_bytes` hold all that a tile needs.

    Per column: `comm_bytes` for every rank, an element sent and one received; 48 bytes of statistics, or
    more for a scaling rule with many; and for the work of each worker a float64 (Gram matrix, or gradients in
    float32), or half as much again where weights differ by parameter, or six times as much for Gram matrices
    by parameter (blocks that parameters share are copied for each). Where workers have several ranks, two
    tiles are under way, and there is a float32 more for the sum of their parts. With `by_node` workers are
    nodes, inside of which each rank's part is work.
    """
    work = 12 if config.mixing.by_parameter else 8
    if config.mixing.needs_gram and config.scope == "parameter":
        work = 48
    if num_ranks > num_workers:
        work, comm_bytes = work + 4, 2 * comm_bytes  # two tiles are under way
    statistics = 48
    if (rule := config.scaling) is not None:
        statistics = max(statistics, 24 + 8 * (rule.num_statistics + rule.num_layer_terms))
    per_column = num_ranks * comm_bytes + (num_ranks if by_node else num_workers) * work + statistics
    return max(3 * config.tile_bytes // per_column, 1)
