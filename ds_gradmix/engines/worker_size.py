"""Which ranks make a worker, where it is larger than one: `gradmix.worker`, and sequence parallelism."""

import os
import socket
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist

from ds_gradmix.comm.groups import RankGroup, gather_objects, group_of
from ds_gradmix.comm.workers import WorkerLevels
from ds_gradmix.config import ConfigError
from ds_gradmix.engines import compatibility


class RankLocation(NamedTuple):
    """Where a rank runs."""

    host: str
    local_rank: int | None  # None where the launcher did not set LOCAL_RANK


def find_levels(
    data: dist.ProcessGroup | None, worker: str | int, ranks_per_replica: int
) -> WorkerLevels | None:
    """The ranks of this rank's worker in a data-parallel group, None if it is one rank; a call of all ranks.

    Raises:
        ConfigError: on all ranks, if some group cannot be divided into such workers.
    """
    if worker in ("rank", 1) and ranks_per_replica == 1:
        return None
    local_rank = os.environ.get("LOCAL_RANK")
    location = RankLocation(socket.gethostname(), None if local_rank is None else int(local_rank))
    gathered = gather_objects((dist.get_process_group_ranks(data), location))
    sets = sorted({tuple(ranks) for ranks, _ in gathered})
    size = ranks_per_worker(sets, [location for _, location in gathered], worker, ranks_per_replica)
    if size == 1:
        return None
    intra = group_of([ranks[i : i + size] for ranks in sets for i in range(0, len(ranks), size)])
    inter = group_of([ranks[place::size] for ranks in sets for place in range(size)])
    return WorkerLevels(RankGroup(intra), RankGroup(inter), size // ranks_per_replica)


def ranks_per_worker(
    sets: Sequence[Sequence[int]],
    locations: Sequence[RankLocation],
    worker: str | int,
    ranks_per_replica: int,
) -> int:
    """How many consecutive ranks of each data-parallel group, one of `sets`, make a worker; `locations` are
    those of all ranks.
    """
    if worker in ("rank", 1):
        return ranks_per_replica
    size = _node_size(sets, locations) if worker == "node" else int(worker)
    found = f" (every node has {size} ranks of a group)" if worker == "node" else ""
    if any(len(ranks) % size for ranks in sets):
        raise ConfigError(compatibility.refused_worker_size(worker, len(sets[0]), found))
    if size % ranks_per_replica:
        raise ConfigError(compatibility.refused_part_of_replica(worker, ranks_per_replica, found))
    return size


def _node_size(sets: Sequence[Sequence[int]], locations: Sequence[RankLocation]) -> int:
    nodes = _nodes(locations)
    sizes: set[int] = set()
    for ranks in sets:
        own = [nodes[rank] for rank in ranks]
        runs = [len(list(run)) for _, run in groupby(own)]
        sizes.update(runs if len(runs) == len(set(own)) > 0 else [0])
    if len(sizes) > 1 or 0 in sizes:
        raise ConfigError(compatibility.refused_nodes(sets))
    return sizes.pop()


def _nodes(locations: Sequence[RankLocation]) -> list[tuple[str, int]]:
    """The node of every rank. Containers may share a host name, so local ranks say where a node begins."""
    counted = all(local is not None for _, local in locations)
    nodes = [(host, rank - (local or 0) if counted else 0) for rank, (host, local) in enumerate(locations)]
    for rank, (node, (host, local)) in enumerate(zip(nodes, locations, strict=True)):
        is_first = rank == 0 or node != nodes[rank - 1]
        if is_first and (local != 0 if counted else nodes.index(node) != rank):
            raise ConfigError(compatibility.refused_rank_order(host, rank, local))
    return nodes
