"""The mpu for megatron-core has the functions that DeepSpeed calls, and refuses what it cannot support.

Training with it is in test_layouts.py.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from ds_gradmix.megatron import ParallelState
from tests.support.ranks import run_ranks

STATE = "megatron.core.parallel_state"


def _state(initialized: bool = True, context: int = 1) -> ModuleType:
    state: Any = ModuleType(STATE)
    state.model_parallel_is_initialized = lambda: initialized
    state.get_context_parallel_world_size = lambda: context
    state.get_tensor_model_parallel_rank = lambda: 7
    state.get_model_parallel_group = lambda: dist.group.WORLD
    state.get_data_parallel_group = lambda: dist.group.WORLD
    return state


def test_without_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, STATE, None)
    with pytest.raises(ImportError, match="pip install megatron-core"):
        ParallelState()


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (_state(initialized=False), RuntimeError, "initialize_model_parallel"),
        (_state(context=2), ValueError, "context_parallel_size: 2"),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, state: Any, error: Any, words: str) -> None:
    monkeypatch.setitem(sys.modules, STATE, state)
    with pytest.raises(error, match=words):
        ParallelState()


def _answers() -> list[Any]:
    sys.modules[STATE] = _state()
    mpu = ParallelState()
    return [
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_model_parallel_world_size(),
        mpu.get_model_parallel_rank(),
        mpu.get_data_parallel_group_ranks(),
        hasattr(mpu, "get_sequence_parallel_world_size"),
    ]


def test_forwards_and_adds() -> None:
    assert run_ranks(2, _answers) == [[7, 2, rank, [0, 1], False] for rank in range(2)]
