"""How the gradients of a bucket are reduced: the one place in which that is decided."""

import enum

from ds_gradmix.config import GradmixConfig
from ds_gradmix.rules import Mean


class Transport(enum.Enum):
    """The ways of a bucket."""

    STOCK = "stock"  # DeepSpeed's own averaging is all there is to do
    WEIGHTED = "weighted"  # weights are decided beforehand: each worker multiplies, and DeepSpeed sums
    SUMMED = "summed"  # each worker multiplies, and an exchange sums
    EXCHANGE = "exchange"  # the workers' gradients themselves have to meet

    @property
    def exchanges(self) -> bool:
        """Whether DeepSpeed's own reduction is left out."""
        return self in (Transport.SUMMED, Transport.EXCHANGE)

    @property
    def weighs(self) -> bool:
        """Whether each worker multiplies its own gradient by a weight that is decided before."""
        return self in (Transport.WEIGHTED, Transport.SUMMED)


def choose_transport(config: GradmixConfig, num_workers: int, sum_sequence_ranks: bool = False) -> Transport:
    """The way of all buckets of an engine; `sum_sequence_ranks` says that gradients have to be summed over
    sequence-parallel ranks, which DeepSpeed leaves out.
    """
    by_deepspeed = config.transport == "deepspeed"
    if not sum_sequence_ranks:
        is_mean = isinstance(config.mixing, Mean) and config.scaling is None
        if num_workers == 1 or (is_mean and config.nonfinite == "propagate" and by_deepspeed):
            return Transport.STOCK
    if config.scaling is not None or (config.mixing.needs_gram and config.sketch_size is None):
        return Transport.EXCHANGE
    return Transport.WEIGHTED if by_deepspeed else Transport.SUMMED
