"""How the gradients of a bucket are reduced: the one place in which that is decided."""

import enum

from ds_gradmix.config import GradmixConfig
from ds_gradmix.rules import Mean


class Transport(enum.Enum):
    """The three ways of a bucket."""

    STOCK = "stock"  # DeepSpeed's own averaging is all there is to do
    WEIGHTED = "weighted"  # weights are known beforehand: each worker multiplies, and DeepSpeed sums
    EXCHANGE = "exchange"  # the workers' gradients themselves have to meet


def choose_transport(config: GradmixConfig, num_workers: int, sum_sequence_ranks: bool = False) -> Transport:
    """The way of all buckets of an engine; `sum_sequence_ranks` says that gradients have to be summed over
    sequence-parallel ranks, which DeepSpeed leaves out.
    """
    is_mean = isinstance(config.mixing, Mean) and config.scaling is None
    if not sum_sequence_ranks and (num_workers == 1 or (is_mean and config.nonfinite == "propagate")):
        return Transport.STOCK
    exchanges = config.mixing.needs_gram or config.scaling is not None
    return Transport.EXCHANGE if exchanges else Transport.WEIGHTED
