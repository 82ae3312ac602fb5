"""Megatron-core's tensor parallelism under DeepSpeed: an mpu for `deepspeed.initialize`.

    from megatron.core import parallel_state
    from ds_gradmix.megatron import ParallelState

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    engine, *_ = deepspeed.initialize(model=model, mpu=ParallelState(), config=config)

`parallel_state` itself does not do: it no longer has some of the functions that DeepSpeed calls.
"""

import importlib
from typing import Any

import torch.distributed as dist


class ParallelState:
    """`megatron.core.parallel_state` with the functions that DeepSpeed calls and Megatron-core has dropped.

    The model-parallel group is Megatron's: all ranks that share one replica of the model. DeepSpeed reduces
    the gradient norm and the decision to skip a step over it. A weight counts on all ranks of the group if
    Megatron has marked it `tensor_model_parallel`, and otherwise on the first alone. Under
    `perform_initialization=False` Megatron marks none, and gradient clipping would use too small a norm.

    Raises:
        ImportError: if megatron-core is not installed.
        RuntimeError: if `initialize_model_parallel` was not called before.
        ValueError: under context parallelism, whose gradients DeepSpeed would not sum.
    """

    _state: Any = None  # in a copy, before its state is set

    def __init__(self) -> None:
        try:
            self._state = importlib.import_module("megatron.core.parallel_state")
        except ImportError as error:
            raise ImportError(
                "ds_gradmix.megatron: megatron-core cannot be imported (pip install megatron-core)"
            ) from error
        if not self._state.model_parallel_is_initialized():
            raise RuntimeError(
                "call megatron.core.parallel_state.initialize_model_parallel() before ParallelState()"
            )
        size = self._state.get_context_parallel_world_size()
        if size > 1:
            raise ValueError(
                f"context_parallel_size: {size}; DeepSpeed supports 1 only: initialize Megatron with 1"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_model_parallel_world_size(self) -> int:
        """The number of ranks that share a replica of the model."""
        return dist.get_world_size(self._state.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This process's rank among those that share its replica."""
        return dist.get_rank(self._state.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self._state.get_data_parallel_group())
