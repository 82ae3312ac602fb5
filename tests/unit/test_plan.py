"""Every element of a bucket is combined once and comes back to its owner, and shares are even where they must
be.
"""

from __future__ import annotations

import random

import pytest

from ds_gradmix.exchange.plan import Piece, plan_tiles


def bucket(lengths_and_owners: list[tuple[int, int]]) -> list[Piece]:
    pieces, start, offsets = [], 0, {}
    for parameter, (length, owner) in enumerate(lengths_and_owners):
        pieces.append(Piece(start, length, owner, parameter, 0, offsets.get(owner, 0)))
        offsets[owner] = offsets.get(owner, 0) + length
        start += length
    return pieces


def elements(pieces: list[Piece]) -> list[tuple[int, int, int]]:
    return [(p.start + i, p.owner, p.partition_offset + i) for p in pieces for i in range(p.length)]


@pytest.mark.parametrize("seed", range(60))
def test_tiles_cover_the_bucket(seed: int) -> None:
    rng = random.Random(seed)
    workers = rng.randint(1, 6)
    owners = [0] if seed % 3 == 0 else list(range(workers))
    pieces = bucket([(rng.randint(1, 90), rng.choice(owners)) for _ in range(rng.randint(1, 12))])
    columns = rng.choice([1, 7, 40, 1000])
    views = [plan_tiles(pieces, range(workers), rank, columns) for rank in range(workers)]
    found = [e for tile in views[0] for region in tile.regions for e in elements(region)]
    assert sorted(found) == sorted(elements(pieces))
    total = sum(piece.length for piece in pieces)
    for k, tile in enumerate(views[0]):
        assert tile.direct == views[0][0].direct
        assert max(tile.sizes) <= columns
        if k < len(views[0]) - 1:
            assert len(set(tile.sizes)) == 1  # the transposition in place needs equal parts
        for rank in range(workers):
            mine = views[rank][k]
            assert [p for p in elements(mine.owned)] == [
                e for region in mine.regions for e in elements(region) if e[1] == rank
            ]
            assert sum(mine.sent_to) == mine.num_columns
            for other in range(workers):
                assert mine.sent_to[other] == views[other][k].received_from[rank]
            if mine.direct:
                assert all(p.owner == rank for p in mine.mine)
    combined = [sum(tile.sizes[j] for tile in views[0]) for j in range(workers)]
    if views[0][0].direct:
        assert workers * max(combined) <= 1.25 * total
    else:
        assert max(combined) - min(combined) <= 1


def test_even_owners_combine_what_they_own() -> None:
    """A model in one bucket: partitions are equal but for the padding of the last."""
    tiles = plan_tiles(bucket([(1000, 3), (1000, 2), (1000, 1), (997, 0)]), range(4), 0, 100)
    assert all(tile.direct for tile in tiles)
    assert [sum(tile.sizes[j] for tile in tiles) for j in range(4)] == [997, 1000, 1000, 1000]


def test_one_owner_keeps_its_share_and_the_rest_travels() -> None:
    tiles = plan_tiles(bucket([(4000, 2)]), range(4), 2, 10_000)
    assert not tiles[0].direct
    assert tiles[0].sizes == [1000] * 4
    assert tiles[0].received_from == [1000] * 4


def test_empty_bucket() -> None:
    assert plan_tiles([], range(3), 0, 10) == []
