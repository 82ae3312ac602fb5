"""Which ranks on which hosts make each worker."""

import socket

import torch.distributed as dist

from ds_gradmix.comm.groups import gather_objects
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.telemetry.alarms import Place


def find_places(parallel: ParallelGroups) -> list[Place]:
    """The place of every worker, its tensor- and pipeline-parallel ranks included; a call of all ranks."""
    everyone = gather_objects((parallel.workers.number, dist.get_rank(), socket.gethostname()))
    own = set(parallel.model.ranks)
    places = []
    for worker in range(parallel.workers.size):
        found = [(rank, host) for number, rank, host in everyone if number == worker and rank in own]
        places.append(Place([rank for rank, _ in found], list(dict.fromkeys(host for _, host in found))))
    return places
