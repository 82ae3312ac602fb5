"""Which of DeepSpeed's test files are run, and where another outcome is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# In a checkout's folder `tests/unit`; those about ZeRO that run on a CPU.
FILES: Sequence[str] = (
    "runtime/zero/test_ignore_unused_parameters.py",
    "runtime/test_multi_output_model.py",
    "runtime/test_no_sync_ctxt.py",
    "runtime/half_precision/test_zero_optim_overflow.py",
    "runtime/half_precision/test_dynamic_loss_scale.py",
    "v1/half_precision/test_bf16.py",
    "v1/zero/test_zero.py",
    "v1/zero/test_zero_coalesce_grad_reduction.py",
    "runtime/zero/test_zero_leaf_module.py",
    "v1/zero/test_zero_activation_checkpoint_lifecycle.py",
)

BLOCKS: Mapping[str, dict[str, Any]] = {
    "GAF that keeps everybody": {"mixing": {"type": "GAF", "params": {"threshold": 2.0}}},
    "mean that drops nonfinite": {"nonfinite": "drop"},
}

# By block: part of a test's name, and why it ends otherwise with it.
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "mean that drops nonfinite": {
        "TestZeROBFloat16::test_ignore_grad_overflow": (
            "it wants steps with gradients that no worker has finite, which are dropped here"
        ),
    },
}
