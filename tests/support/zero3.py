"""What tests of ZeRO-3 have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tests.support.training import Case

EXACT: dict[str, Any] = {"gram": "exact"}
GAF: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 0.9}}}
OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
OFFLOAD_OPTIMIZER: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
IN_PARTS: dict[str, Any] = {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}
ALL_PERSISTENT: dict[str, Any] = {"stage3_param_persistence_threshold": 10**6}
SMALL = 500  # elements of a bucket: the largest parameter has more


def stage3(block: dict[str, Any] | None, **settings: Any) -> Case:
    return Case(block, stage=3, **{"steps": 3, **settings})


class Inner(torch.nn.Module):
    """Two layers, the activations between which are stored, or computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = torch.nn.Linear(13, 31)
        self.second = torch.nn.Linear(31, 29)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class Outer(torch.nn.Module):
    """`reentrant` says which way activations are computed again, None that they are stored."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner = Inner()
        self.last = torch.nn.Linear(29, 3)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()  # as hooks of leaf modules and of reentrant checkpointing want it
        if self.reentrant is None:
            return self.last(self.inner(x))
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))
