"""How the gradients of a bucket are reduced: the one place in which that is decided."""

import enum

from ds_gradmix.config import GradmixConfig
from ds_gradmix.rules import Mean, NormMixing


class Transport(enum.Enum):
    """The ways of a bucket."""

    STOCK = "stock"  # DeepSpeed's own averaging is all there is to do
    # Each worker multiplies by W times its weight, 1 where that is the mean's, and DeepSpeed averages.
    RESCALED = "rescaled"
    WEIGHTED = "weighted"  # weights are decided beforehand: each worker multiplies, and DeepSpeed sums
    EXCHANGE = "exchange"  # the workers' gradients themselves meet


def decides_before(config: GradmixConfig) -> bool:
    """Whether all is decided before any gradient is sent: without factors, and without Gram matrices but
    those of sketches.
    """
    return config.scaling is None and (not config.mixing.needs_gram or config.sketch_size is not None)


def choose_transport(config: GradmixConfig, num_workers: int, sum_sequence_ranks: bool = False) -> Transport:
    """The way of all buckets of an engine; `sum_sequence_ranks` says that gradients have to be summed over
    sequence-parallel ranks, which DeepSpeed leaves out.
    """
    by_deepspeed = config.transport == "deepspeed" and decides_before(config)
    is_mean = isinstance(config.mixing, Mean) and config.nonfinite == "propagate"
    if not sum_sequence_ranks and (num_workers == 1 or (is_mean and by_deepspeed)):
        return Transport.STOCK
    if by_deepspeed and isinstance(config.mixing, NormMixing | Mean) and not sum_sequence_ranks:
        return Transport.RESCALED
    return Transport.WEIGHTED if by_deepspeed else Transport.EXCHANGE
