"""Sequence parallelism as DeepSpeed knows it (Ulysses): attention over a sequence that is spread over ranks,
and an mpu of sequence and data parallelism.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.support.models import Attention
from tests.support.tensor_layers import Grid, own_group


class Ulysses(torch.nn.Module):
    """Each rank has some positions of all heads, and attends with some heads at all positions."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        from deepspeed.sequence.layer import DistributedAttention

        self.inner = DistributedAttention(Attention(), group, scatter_idx=2, gather_idx=1)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner(q, k, v, 0)


class SequenceParallel:
    """An mpu for `deepspeed.initialize`: neighbours share a sequence, all ranks add up their gradients."""

    def __init__(self, data: int, sequence: int) -> None:
        grid = Grid(data, sequence)
        self.sequence_group, self.data_group = grid.tensor_group, grid.data_group
        self.all = own_group([list(range(data * sequence))])
        self.alone = own_group([[rank] for rank in range(data * sequence)])

    def get_sequence_parallel_group(self) -> ProcessGroup:
        return self.sequence_group

    def get_sequence_parallel_rank(self) -> int:
        return self.sequence_group.rank()

    def get_sequence_parallel_world_size(self) -> int:
        return self.sequence_group.size()

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        return self.all

    def get_sequence_data_parallel_rank(self) -> int:
        return self.all.rank()

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.all.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data_group.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data_group)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1
