from typing import NamedTuple

import torch
from torch import Tensor


class MixingDecision(NamedTuple):
    """Weights of W workers for each of S segments, which are the bucket, or every parameter in it.

    Rows of weights, float64, sum to 1, or to 0 where no worker agreed with another. `mean_cosine_S`, float64,
    is the mean cosine between different workers' gradients, NaN where no Gram matrix was needed.
    """

    weights_SW: Tensor
    agreed_S: Tensor  # bool
    mean_cosine_S: Tensor | None = None

    def packed(self) -> Tensor:
        """One `[S, W + 2]` float64 tensor, to be sent to other ranks."""
        assert self.mean_cosine_S is not None
        return torch.column_stack([self.weights_SW, self.agreed_S, self.mean_cosine_S])

    @staticmethod
    def unpacked(packed: Tensor) -> "MixingDecision":
        """The inverse of `packed`."""
        return MixingDecision(packed[:, :-2], packed[:, -2] != 0, packed[:, -1])
