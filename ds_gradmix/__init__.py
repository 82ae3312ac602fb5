"""Gradient mixing, filtering and variance scaling in place of averaging, inside DeepSpeed ZeRO.

    g = r * sum_i w_i grad f_i(theta + delta_i)

`mixing` gives the workers' weights w, `scaling` the coordinates' factors r, `extrapolation` the offsets
delta; all are switched on by a block in ds_config.json. See the README.
"""

from __future__ import annotations

from typing import Any

from ds_gradmix.combine import combine
from ds_gradmix.config import ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "__version__", "combine", "enable", "initialize", "stats"]


def enable() -> None:
    """Make every DeepSpeed engine built from here on honour the `gradmix` block of its config.

    `python -m ds_gradmix script.py` calls this before the script. An engine without a block stays DeepSpeed's
    own, and says so in one line.
    """
    from ds_gradmix.engines.install import enable as enable_hook  # DeepSpeed takes seconds to import

    enable_hook()


def initialize(*args: Any, **kwargs: Any) -> Any:
    """`deepspeed.initialize` with the rules of the config's `gradmix` block: same arguments, same result.

    Raises:
        ConfigError: for a mistake in the block, or a setting that cannot be combined with it.
    """
    enable()
    import deepspeed

    return deepspeed.initialize(*args, **kwargs)


def stats(engine: Any) -> dict[str, float]:
    """What the rules decided in an engine's last optimizer step; empty if none are active, or before the
    first step.

    Returns:
        `kept_fraction` of the workers with a weight other than 0, `effective_workers` (1 / sum of squared
        weights), `agreed_fraction` of the decisions in which workers agreed, `mean_cosine` between different
        workers (where a rule needs it), `mean_factor` of the scaling rule (if any), `dropped_workers`, how
        often one was left out of a reduction (`nonfinite: "drop"`), and `skipped`, 1 if the step was skipped.
        The same on every rank.
    """
    from ds_gradmix.engines.install import seam_of

    seam = seam_of(engine)
    return {} if seam is None else dict(seam.stats)
