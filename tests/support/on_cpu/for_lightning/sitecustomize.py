"""Python runs this first in ranks of test_recipes.py without a GPU: their PYTHONPATH has this folder.

Lightning's DeepSpeedStrategy refuses every accelerator but CUDA's, and hands on the index of the rank's
device, which a CPU has none of. Here it takes the CPU, all of whose devices have index 0.
"""

import os

if "LOCAL_RANK" in os.environ:
    import torch
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import deepspeed

    deepspeed.CUDAAccelerator = CPUAccelerator
    deepspeed._validate_device_index_selection = lambda devices: None
    CPUAccelerator.get_parallel_devices = staticmethod(lambda devices: [torch.device("cpu", 0)] * devices)
