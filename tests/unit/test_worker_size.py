"""Which ranks make a worker, told by a number, by what launchers say of nodes, or by hosts' names."""

from __future__ import annotations

import pytest

from ds_gradmix.config import ConfigError
from ds_gradmix.engines.worker_size import RankLocation, ranks_per_worker


def seats(*hosts: str, local_ranks: list[int] | None = None) -> list[RankLocation]:
    """One letter of a host for each rank; local ranks are counted on it, or given, or unknown."""
    found: list[RankLocation] = []
    for words in hosts:
        for rank, host in enumerate(words):
            found.append(RankLocation(host, rank if local_ranks is None else None))
    if local_ranks:
        return [seat._replace(local_rank=local) for seat, local in zip(found, local_ranks, strict=True)]
    return found


ALL = [list(range(8))]
TENSOR_PAIRS = [[0, 2, 4, 6], [1, 3, 5, 7]]
NODES = {
    "two nodes": (ALL, seats("aaaa", "bbbb"), 4),
    "one node": (ALL, seats("aaaaaaaa"), 8),
    "hosts of one name": (ALL, seats("aaaa", "aaaa"), 4),
    "a rank a node": (ALL, seats(*"abcdefgh"), 1),
    "no local ranks": (ALL, seats("aaaabbbb", local_ranks=[]), 4),
    "tensor parallel inside nodes": (TENSOR_PAIRS, seats("aaaa", "bbbb"), 2),
    "tensor parallel over a node": ([[0, 4], [1, 5], [2, 6], [3, 7]], seats("aaaa", "bbbb"), 1),
    "stages on nodes": ([[0, 1, 2, 3], [4, 5, 6, 7]], seats("aaaa", "bbbb"), 4),
}


@pytest.mark.parametrize("name", NODES)
def test_a_node(name: str) -> None:
    sets, where, size = NODES[name]
    assert ranks_per_worker(sets, where, "node", 1) == size


WRONG = {
    "uneven nodes": (ALL, seats("aaaaa", "bbb"), "the same number of consecutive ranks on every node"),
    "ranks dealt out": (
        ALL,
        seats("abababab", local_ranks=[0, 0, 1, 1, 2, 2, 3, 3]),
        "do not follow each other",
    ),
    "the same on hosts of one name": (
        ALL,
        seats("aaaaaaaa", local_ranks=[0, 0, 1, 1, 2, 2, 3, 3]),
        "do not follow each other",
    ),
    "dealt out, no local ranks": (ALL, seats("abababab", local_ranks=[]), "do not follow each other"),
    "groups that differ": (
        [[0, 1, 2, 4], [3, 5, 6, 7]],
        seats("aaaa", "bbbb"),
        "on every node: [[0, 1, 2, 4]",
    ),
    "a group that comes back": ([[0, 4, 1, 5]], seats("aaaa", "bbbb"), "on every node"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_node(name: str) -> None:
    sets, where, words = WRONG[name]
    with pytest.raises(ConfigError, match=r'gradmix\.worker: "node"') as caught:
        ranks_per_worker(sets, where, "node", 1)
    assert words in str(caught.value) and "allowed" in str(caught.value)


def test_numbers() -> None:
    where = seats("aaaa", "bbbb")
    assert [ranks_per_worker(ALL, where, worker, 1) for worker in ("rank", 1, 2, 8)] == [1, 1, 2, 8]
    assert [ranks_per_worker(ALL, where, worker, 2) for worker in ("rank", 1, 2, 4, "node")] == [
        2,
        2,
        2,
        4,
        4,
    ]
    with pytest.raises(
        ConfigError, match=r"gradmix\.worker: 3, but a data-parallel group has 8 ranks; allowed is a"
    ):
        ranks_per_worker(ALL, where, 3, 1)
    with pytest.raises(
        ConfigError, match="2 ranks share a replica by sequence parallelism; allowed is a mult"
    ):
        ranks_per_worker([[0, 1, 2, 3, 4, 5]], where, 3, 2)
