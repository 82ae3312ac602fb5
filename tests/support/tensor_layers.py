"""Tensor parallelism written by hand: groups of ranks behind Megatron's function names, and linear layers
split by columns and by rows.

Ranks are numbered as Megatron numbers them: neighbours share a tensor, then come data ranks, pipeline stages
last. Sequence ranks take the tensor ranks' place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@functools.cache
def _all_groups(all_ranks: tuple[tuple[int, ...], ...]) -> list[ProcessGroup]:
    return [dist.new_group(list(ranks)) for ranks in all_ranks]


def own_group(all_ranks: list[list[int]]) -> ProcessGroup:
    """The one of these groups that this rank is in; they are made once in a process."""
    groups = _all_groups(tuple(tuple(ranks) for ranks in all_ranks))
    mine = dist.get_rank()
    return next(group for group, ranks in zip(groups, all_ranks, strict=True) if mine in ranks)


class Grid:
    """Where a rank stands among `pipe` x `data` x `tensor` ranks."""

    def __init__(self, data: int, tensor: int, pipe: int = 1) -> None:
        ranks = torch.arange(pipe * data * tensor).view(pipe, data, tensor)
        self.tensor_group = own_group(ranks.reshape(-1, tensor).tolist())
        self.data_group = own_group(ranks.transpose(1, 2).reshape(-1, data).tolist())
        self.pipe_group = own_group(ranks.permute(1, 2, 0).reshape(-1, pipe).tolist())
        self.model_group = own_group(ranks.transpose(0, 1).reshape(-1, pipe * tensor).tolist())


class TensorParallel:
    """An mpu for `deepspeed.initialize`, of tensor and data parallelism."""

    def __init__(self, data: int, tensor: int) -> None:
        self._grid = Grid(data, tensor)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._grid.model_group

    def get_model_parallel_rank(self) -> int:
        return self._grid.model_group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._grid.model_group.size()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self._grid.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._grid.tensor_group.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._grid.tensor_group.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._grid.data_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._grid.data_group.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._grid.data_group)

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        return self._grid.pipe_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._grid.pipe_group.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._grid.pipe_group.size()


class _Copy(torch.autograd.Function):
    """Every rank uses x: the gradients of all are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """Every rank adds to x: all get its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class Gather(torch.autograd.Function):
    """Columns of all ranks side by side: each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None


def _sharded(*shape: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.empty(*shape))
    p.tensor_model_parallel = True  # as Megatron marks it, and DeepSpeed reads it
    return p


class Column(torch.nn.Module):
    """x @ W.T + b, each rank some rows of W."""

    def __init__(self, num_in: int, num_out: int, group: ProcessGroup, bias: bool = True) -> None:
        super().__init__()
        self.weight = _sharded(num_out // group.size(), num_in)
        self.bias = _sharded(num_out // group.size()) if bias else None
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(_Copy.apply(x, self.group), self.weight, self.bias)


class Row(torch.nn.Module):
    """x @ W.T + b, each rank some columns of W and of x; all have b."""

    def __init__(self, num_in: int, num_out: int, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = _sharded(num_out, num_in // group.size())
        self.bias = torch.nn.Parameter(torch.empty(num_out))
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(torch.nn.functional.linear(x, self.weight), self.group) + self.bias


class Vocabulary(torch.nn.Module):
    """An embedding, each rank some rows of it; `logits` multiplies by its transpose."""

    def __init__(self, num_words: int, width: int, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = _sharded(num_words // group.size(), width)
        self.group = group

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        local = words - self.group.rank() * len(self.weight)
        own = (local >= 0) & (local < len(self.weight))
        found = torch.nn.functional.embedding(local * own, self.weight) * own.unsqueeze(-1)
        return _Sum.apply(found, self.group)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return Gather.apply(torch.nn.functional.linear(_Copy.apply(x, self.group), self.weight), self.group)


class Head(Column):
    """Logits of all words on every rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Gather.apply(super().forward(x), self.group)
