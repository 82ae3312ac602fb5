from typing import NamedTuple

import torch
from torch import Tensor


class MixingDecision(NamedTuple):
    """Weights of W workers for each of S segments, which are the bucket, or every parameter in it.

    Rows of weights, float64, sum to 1 unless the rule says otherwise, and to 0 where no worker agreed with
    another. `mean_cosine_S`, float64, is the mean cosine between different workers' gradients, NaN where no
    Gram matrix was needed; training fills it in.
    """

    weights_SW: Tensor
    agreed_S: Tensor  # bool
    mean_cosine_S: Tensor | None = None


class Considered(NamedTuple):
    """A decision from Gram matrices, and what else is known of it.

    `margin_S`, float64, is how far a cosine was from the threshold that a rule compared it with, in the
    closest of its comparisons; infinite for a rule that compares none. `next_state_SKW` is the rule's state
    as each segment would have it.
    """

    decision: MixingDecision
    margin_S: Tensor
    next_state_SKW: Tensor


def packed(considered: Considered) -> Tensor:
    """One `[S, W + 3 + K W]` float64 tensor, to be sent to other ranks."""
    decision, margin_S, next_state_SKW = considered
    assert decision.mean_cosine_S is not None
    columns = [decision.weights_SW, decision.agreed_S, decision.mean_cosine_S, margin_S]
    return torch.column_stack([*columns, next_state_SKW.flatten(1)])


def unpacked(packed_SC: Tensor, num_workers: int) -> Considered:
    """The inverse of `packed`."""
    w = num_workers
    decision = MixingDecision(packed_SC[:, :w], packed_SC[:, w] != 0, packed_SC[:, w + 1])
    return Considered(decision, packed_SC[:, w + 2], packed_SC[:, w + 3 :].unflatten(1, (-1, w)))
