"""Which of DeepSpeed's test files are run, and where another outcome is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# In a checkout's folder `tests/unit`; those about ZeRO-0, 1 and 2 that run on a CPU.
FILES: Sequence[str] = ("v1/zero/test_zero.py",)

BLOCKS: Mapping[str, dict[str, Any]] = {
    "GAF that keeps everybody": {"mixing": {"type": "GAF", "params": {"threshold": 2.0}}},
    "mean that drops nonfinite": {"nonfinite": "drop"},
}

# Part of a test's name, and why it may end otherwise with a block.
EXPECTED: Mapping[str, str] = {}
