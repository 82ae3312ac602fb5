"""Python runs this first in ranks of test_recipes.py without a GPU: their PYTHONPATH has this folder.

Accelerate sets up torch.distributed for DeepSpeed where it knows a backend for the machine's accelerator. On
a CPU it knows one only with `use_cpu`, which rules DeepSpeed out; without, every rank takes itself for the
only one. Here it is gloo.
"""

import os
from typing import Any

if "LOCAL_RANK" in os.environ:
    from accelerate.state import PartialState

    prepare_backend = PartialState._prepare_backend

    def with_gloo(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: Any = None) -> Any:
        return prepare_backend(self, cpu, sagemaker_dp, backend or "gloo")

    PartialState._prepare_backend = with_gloo
