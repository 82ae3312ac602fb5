"""Which ranks make a worker, where it is larger than one: `gradmix.worker`, and sequence parallelism."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist

from ds_gradmix.comm.groups import RankGroup, gather_objects, group_of
from ds_gradmix.comm.workers import WorkerLevels
from ds_gradmix.config import ConfigError
from ds_gradmix.engines.compatibility import refused_worker_size


class RankLocation(NamedTuple):
    """Where a rank runs."""

    host: str
    local_rank: int | None  # None where no launcher has told


def find_levels(
    data: dist.ProcessGroup | None, worker: str | int, ranks_per_replica: int
) -> WorkerLevels | None:
    """This rank's team in its data-parallel group, or None if a worker is one rank; all ranks must ask
    together.

    Args:
        data: the data-parallel group.
        worker: `"rank"`, `"node"`, or a number of consecutive ranks.
        ranks_per_replica: neighbours in the group that share one replica.

    Raises:
        ConfigError: on all ranks, if some group cannot be divided into such workers.
    """
    if worker in ("rank", 1) and ranks_per_replica == 1:
        return None
    local_rank = os.environ.get("LOCAL_RANK")
    seat = RankLocation(socket.gethostname(), None if local_rank is None else int(local_rank))
    told = gather_objects((dist.get_process_group_ranks(data), seat))
    sets = sorted({tuple(ranks) for ranks, _ in told})
    size = ranks_per_worker(sets, [seat for _, seat in told], worker, ranks_per_replica)
    if size == 1:
        return None
    inside = group_of([ranks[i : i + size] for ranks in sets for i in range(0, len(ranks), size)])
    across = group_of([ranks[place::size] for ranks in sets for place in range(size)])
    return WorkerLevels(RankGroup(inside), RankGroup(across), size // ranks_per_replica)


def ranks_per_worker(
    sets: Sequence[Sequence[int]], seats: Sequence[RankLocation], worker: str | int, ranks_per_replica: int
) -> int:
    """How many consecutive ranks of each data-parallel group make a worker.

    Args:
        sets: the ranks of the data-parallel groups.
        seats: of all ranks.
        worker: `"rank"`, `"node"`, or a number.
        ranks_per_replica: of sequence parallelism.

    Raises:
        ConfigError: if they cannot be divided so.
    """
    if worker == "rank" or worker == 1:
        return ranks_per_replica
    size = _node_size(sets, seats) if worker == "node" else int(worker)
    shown = '"node"' if worker == "node" else str(worker)
    found = f" (every node has {size} ranks of a group)" if worker == "node" else ""
    if any(len(ranks) % size for ranks in sets):
        raise ConfigError(refused_worker_size(worker, len(sets[0]), found))
    if size % ranks_per_replica:
        raise ConfigError(
            f"gradmix.worker: {shown}, but {ranks_per_replica} ranks share a replica by sequence "
            f'parallelism{found}; allowed is a multiple of these, or "rank" for one replica'
        )
    return size


def _node_size(sets: Sequence[Sequence[int]], seats: Sequence[RankLocation]) -> int:
    nodes = _nodes(seats)
    sizes = set()
    for ranks in sets:
        runs = [len(list(run)) for _, run in groupby(nodes[rank] for rank in ranks)]
        if len(runs) > len({nodes[rank] for rank in ranks}):
            runs = []
        sizes.update(runs or [0])
    if len(sizes) > 1 or 0 in sizes:
        raise ConfigError(
            'gradmix.worker: "node", but data-parallel groups do not have the same number of consecutive '
            f'ranks on every node: {list(map(list, sets))}; allowed there is a number of ranks, or "rank"'
        )
    return sizes.pop()


def _nodes(seats: Sequence[RankLocation]) -> list[tuple[str, int]]:
    """The node of every rank. Containers may share a host name, so local ranks say where a node begins."""
    counted = all(seat.local_rank is not None for seat in seats)
    nodes = [(seat.host, rank - (seat.local_rank or 0) if counted else 0) for rank, seat in enumerate(seats)]
    for node, first, local_ranks in _runs(nodes, seats):
        if (counted and local_ranks != list(range(len(local_ranks)))) or nodes.index(node) != first:
            raise ConfigError(
                f'gradmix.worker: "node", but the ranks of node {node[0]} do not follow each other (rank '
                f"{first} has LOCAL_RANK {local_ranks[0]}); allowed are launchers that fill one node after "
                'another, or a number of ranks, or "rank"'
            )
    return nodes


def _runs(
    nodes: Sequence[tuple[str, int]], seats: Sequence[RankLocation]
) -> Iterator[tuple[tuple[str, int], int, list[int | None]]]:
    first = 0
    for node, run in groupby(nodes):
        length = len(list(run))
        yield node, first, [seat.local_rank for seat in seats[first : first + length]]
        first += length
