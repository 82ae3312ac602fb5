"""A plugin of pytest that gives every engine of DeepSpeed's tests a gradmix block.

The tests' ranks are processes of a fork server, which imports this module, too. Engines that ds_gradmix
refuses with the block are built without it. What became of each is a line of a log.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from typing import Any

import hjson

BLOCK, CHECKOUT, LOG = "GRADMIX_SUITE_BLOCK", "GRADMIX_SUITE_CHECKOUT", "GRADMIX_SUITE_LOG"
_suspended = False  # while an engine is built without the block


def pytest_configure() -> None:
    """Have the fork server import this module."""
    multiprocessing.set_forkserver_preload([__name__])


def _import_deepspeed() -> Any:
    """The installed one, although the tests put their checkout on the path."""
    path = list(sys.path)
    sys.path[:] = [folder for folder in path if os.path.realpath(folder or ".") != os.environ[CHECKOUT]]
    try:
        import deepspeed
    finally:
        sys.path[:] = path
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo serves
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":  # slow on a CPU, but true arithmetic
        accelerator.is_fp16_supported = accelerator.is_bf16_supported = lambda: True
        accelerator.device_count = lambda: 8  # ranks share its cores
    return deepspeed


def _tell(what: str) -> None:
    with open(os.environ[LOG], "a") as log:
        log.write(f"{what}\n")


def _with_block(config: object, block: Mapping[str, Any]) -> object:
    """A ds_config, or its file, with the block, unless ds_gradmix refuses that."""
    from ds_gradmix.config import parse_block
    from ds_gradmix.engines.compatibility import refused_settings

    if isinstance(config, str) and os.path.exists(config):
        with open(config) as file:
            config = hjson.load(file)
    if _suspended or not isinstance(config, dict):
        return config
    if any(refused_settings(config, parse_block(block))):
        return config
    return {**config, "gradmix": block}


def _inject(deepspeed: Any, block: Mapping[str, Any]) -> None:
    import ds_gradmix
    from ds_gradmix.engines.install import reducer_of

    ds_gradmix.enable()
    kind, initialize = deepspeed.runtime.config.DeepSpeedConfig, deepspeed.initialize
    original = kind.__init__

    @functools.wraps(original)
    def read(self: Any, config: object, *args: Any, **kwargs: Any) -> None:
        original(self, _with_block(config, block), *args, **kwargs)

    @functools.wraps(initialize)
    def build(*args: Any, **kwargs: Any) -> Any:
        global _suspended
        try:
            built = initialize(*args, **kwargs)
        except ds_gradmix.ConfigError:
            _suspended = True
            try:
                built = initialize(*args, **kwargs)
            finally:
                _suspended = False
        _tell("without" if reducer_of(built[0]) is None else "active")
        return built

    kind.__init__ = read
    deepspeed.initialize = build


if BLOCK in os.environ:
    _deepspeed = _import_deepspeed()
    if (_block := json.loads(os.environ[BLOCK])) is not None:
        _inject(_deepspeed, _block)
