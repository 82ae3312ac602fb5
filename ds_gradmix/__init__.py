"""Gradient mixing, filtering and variance scaling in place of averaging, inside DeepSpeed ZeRO.

    g = r * sum_i w_i grad f_i(theta + delta_i)

`mixing` gives the workers' weights w, `scaling` the coordinates' factors r, `extrapolation` the offsets
delta; all are switched on by a block in ds_config.json: docs/configuration.md.
"""

from typing import Any

from ds_gradmix.combine import combine
from ds_gradmix.config import ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "__version__", "combine", "disable", "enable", "initialize", "stats"]


def enable() -> None:
    """Make every DeepSpeed engine built from here on honour the `gradmix` block of its config.

    `python -m ds_gradmix script.py` calls this before the script. An engine without a block stays DeepSpeed's
    own, and a warning says so. Calling it again changes nothing.

    Raises:
        RuntimeError: if a function of the installed DeepSpeed has another signature than in the tested
            version; a function whose code alone has changed is named in a warning.
    """
    from ds_gradmix.engines import install  # DeepSpeed takes seconds to import

    install.enable()


def disable() -> None:
    """Undo `enable`: engines built from here on are DeepSpeed's own, those built before keep their rules.

    Where other code has wrapped DeepSpeed's constructor after `enable`, a warning says so; ours then stays
    below that, and passes calls on unchanged.
    """
    from ds_gradmix.engines import install

    install.disable()


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
        `kept_fraction` of the workers with a weight other than 0, `effective_workers` (the square of the sum
        of weights by the sum of their squares), `agreed_fraction` of the decisions in which workers agreed,
        `skipped_buckets`, how many did not, `mean_cosine` between different workers (where a rule needs it),
        `mean_factor` of the scaling rule and `floor_fraction` at its smallest (if any), `dropped_workers`,
        how often one was left out of a reduction (`nonfinite: "drop"`), `close_calls`, decisions within 3
        standard errors of a threshold (with `gram: {"sketch": m}`), and `skipped`, 1 if the step was skipped.
        With `telemetry` also what docs/telemetry.md lists, numbers of a worker as `worker_norm/0`; they are
        those of the last reading. The same on every rank, but for `seconds`, `bytes_sent`, `offset_ratio`,
        and in a pipeline `noise_scale_tokens`, which the first stage's ranks know.
    """
    from ds_gradmix.engines.install import reducer_of

    reducer = reducer_of(engine)
    return {} if reducer is None else dict(reducer.stats)
