"""What tests of ZeRO-3, and of universal checkpoints, have in common."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch.utils.checkpoint import checkpoint

from tests.support.training import Case, build, train

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


def by_every_way(case: Case) -> list[dict[str, Any]]:
    """The weights after training with activations stored, computed again by both ways, and as a leaf."""
    found = []
    for reentrant, leaf in ((None, False), (False, False), (True, False), (None, True)):
        model = Outer(reentrant)
        if leaf:
            deepspeed.utils.set_z3_leaf_modules(model, [Inner])
        found.append(train(build(case, model), case)["weights"])
    return found


def to_universal(folder: Path) -> None:
    """Convert the checkpoint of step 3 in a folder, by DeepSpeed's script."""
    folders = {"input_folder": f"{folder}/global_step3", "output_folder": f"{folder}/universal"}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": False, "inject_missing_state": True}
    ds_to_universal.main(Namespace(**folders, **workers, **flags))
