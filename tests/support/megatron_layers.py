"""The layers of megatron-core, with the signatures of `models.Plain`.

Megatron's own gathering of logits runs on GPUs only, so that one is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

from tests.support import models
from tests.support.tensor_layers import Gather


class Megatron(models.Plain):
    def __init__(self, tensor: int) -> None:
        super().__init__()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, create_gloo_process_groups=False
        )
        self.column, self.row, self.head = _Column, _Row, _Head

    def vocabulary(self) -> torch.nn.Module:
        return _Vocabulary(models.WORDS, models.WIDTH, **_options())


def _options() -> dict[str, Any]:
    config = ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
    )
    return {"config": config, "init_method": torch.nn.init.zeros_}


class _Column(tensor_parallel.ColumnParallelLinear):
    def __init__(self, num_in: int, num_out: int, bias: bool = True) -> None:
        super().__init__(num_in, num_out, bias=bias, gather_output=False, **_options())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class _Head(_Column):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Gather.apply(super().forward(x), self.tp_group)


class _Row(tensor_parallel.RowParallelLinear):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(
            num_in, num_out, bias=True, input_is_parallel=True, skip_bias_add=False, **_options()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class _Vocabulary(tensor_parallel.VocabParallelEmbedding):
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        x = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        return Gather.apply(torch.nn.functional.linear(x, self.weight), self.tp_group)
