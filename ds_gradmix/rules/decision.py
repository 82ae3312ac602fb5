from typing import NamedTuple

import torch
from torch import Tensor


class MixingDecision(NamedTuple):
    """Weights of W workers for each of S segments, which are the bucket, or every parameter in it.

    Rows of weights, float64, sum to 1, or to 0 where no worker agreed with another. `mean_cosine_S`, float64,
    is the mean cosine between different workers' gradients, NaN where no Gram matrix was needed; training
    fills it in.
    """

    weights_SW: Tensor
    agreed_S: Tensor  # bool
    mean_cosine_S: Tensor | None = None


def packed(decision: MixingDecision, next_state_SKW: Tensor) -> Tensor:
    """One `[S, W + 2 + K W]` float64 tensor, to be sent to other ranks."""
    assert decision.mean_cosine_S is not None
    columns = [decision.weights_SW, decision.agreed_S, decision.mean_cosine_S, next_state_SKW.flatten(1)]
    return torch.column_stack(columns)


def unpacked(packed_SC: Tensor, num_workers: int) -> tuple[MixingDecision, Tensor]:
    """The inverse of `packed`."""
    w = num_workers
    next_state_SKW = packed_SC[:, w + 2 :].unflatten(1, (-1, w))
    return MixingDecision(packed_SC[:, :w], packed_SC[:, w] != 0, packed_SC[:, w + 1]), next_state_SKW
