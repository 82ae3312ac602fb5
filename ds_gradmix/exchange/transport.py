from __future__ import annotations

from enum import Enum, auto

from ds_gradmix.config import GradmixConfig
from ds_gradmix.rules import Mean


class Transport(Enum):
    """How the gradients of a bucket travel."""

    STOCK = auto()
    WEIGHTED = auto()
    EXCHANGE = auto()


def choose_transport(config: GradmixConfig, num_workers: int, sum_sequence_ranks: bool = False) -> Transport:
    """The one place that decides how gradients travel."""
    rules_do_nothing = isinstance(config.mixing, Mean) and config.scaling is None
    if num_workers == 1 or (rules_do_nothing and config.nonfinite == "propagate"):
        return Transport.WEIGHTED if sum_sequence_ranks else Transport.STOCK
    if config.mixing.needs_gram or config.scaling is not None:
        return Transport.EXCHANGE
    return Transport.WEIGHTED
