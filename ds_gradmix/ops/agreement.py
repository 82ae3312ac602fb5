"""Filtering by agreement, which takes workers one after another: `a` is the first, and each that follows is
merged into it if its cosine with `a` is large enough.

On a GPU that is one program (kernels/agreement.py). On the host, where the numbers are on a CPU and wherever
there is no Triton, all workers are judged at once, as if those judged before were right, until that is so:
each pass settles one worker more at least, and with real gradients all of them in a few.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix.ops import kernels
from ds_gradmix.ops.segments import to_device

Array = npt.NDArray[np.float64]

_NO_LENGTH = 1e150  # in place of a length of 0: every cosine with it is 0


class AgreementFilter(NamedTuple):
    """The filter, for Gram matrices `[S, W, W]` in float64.

    With `midpoint` a worker is merged as `a <- (a + g_i)/2`, else as `a <- a + g_i`.
    """

    least_cosine: float
    tolerance: float  # by which a cosine may be less
    midpoint: bool

    def __call__(
        self, gram_SWW: Tensor, present_W: Tensor, order_W: npt.NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the workers, `[S, W]`; whether anybody agreed with the first, if there is one, `[S]`;
        and how far from `least_cosine` the closest cosine was, `[S]`. Workers are taken in order, the absent
        left out.
        """
        if kernels.available(gram_SWW.device):
            from ds_gradmix.ops.kernels.agreement import filter_by_agreement

            on_device_W = to_device(torch.from_numpy(order_W).int(), gram_SWW.device)
            return filter_by_agreement(gram_SWW.contiguous(), present_W, on_device_W, *self)
        gram, present = gram_SWW.cpu().numpy(), present_W.cpu().numpy()
        order = np.concatenate([order_W[present[order_W]], order_W[~present[order_W]]])
        with np.errstate(all="ignore"):
            shares, margins = self._filter(gram[:, order[:, None], order], present[order])
        agreed = (shares != 0).sum(1) > min(present.sum(), 2) - 1  # one alone has nobody who could disagree
        weights = shares[:, np.argsort(order)] / np.maximum(shares.sum(1, keepdims=True), 0.5)
        found = (torch.from_numpy(array) for array in (weights, agreed & present.any(), margins))
        weights_SW, agreed_S, margins_S = (values.to(gram_SWW.device) for values in found)
        return weights_SW, agreed_S, margins_S

    def _filter(self, gram_SWW: Array, present_W: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
        """Coefficients of `a` in the workers' gradients, and margins."""
        num_workers = gram_SWW.shape[1]
        squares_SW = np.diagonal(gram_SWW, axis1=1, axis2=2)
        norms_SW = np.sqrt(np.maximum(squares_SW, 0))
        # <g_i, g_j>/|g_i| for the j before i
        before_SWW = np.tril(np.where(norms_SW[:, :, None] > 0, gram_SWW / norms_SW[:, :, None], 0.0), -1)
        kept_SW = np.broadcast_to(present_W, squares_SW.shape).astype(np.float64)
        for _ in range(num_workers):
            dots_SW, lengths_SW = self._met(before_SWW, squares_SW, norms_SW, kept_SW)
            agree_SW = dots_SW >= (self.least_cosine - self.tolerance) * lengths_SW
            agree_SW[:, 0] = True
            previous_SW, kept_SW = kept_SW, (agree_SW & present_W).astype(np.float64)
            if np.array_equal(previous_SW, kept_SW):
                break
        distances_SW = np.abs(dots_SW / lengths_SW - self.least_cosine)
        margins_S = distances_SW[:, 1:].min(axis=1, initial=np.inf, where=present_W[1:])
        shares_SW = self._shares(kept_SW, kept_SW.sum(1, keepdims=True)[:, :, None])[:, 0]
        return shares_SW if self.midpoint else kept_SW, margins_S

    def _met(
        self, before_SWW: Array, squares_SW: Array, norms_SW: Array, kept_SW: Array
    ) -> tuple[Array, Array]:
        """`<a, g_i>/|g_i|` and `|a|` as worker i meets `a`, if these are kept, `[S, W]`."""
        if self.midpoint:
            counts_SW = np.cumsum(kept_SW, axis=1) - kept_SW
            shares_SWW = np.tril(self._shares(kept_SW, counts_SW[:, :, None]), -1)
            dots_SW = (before_SWW * shares_SWW).sum(2)
            grown_SW = squares_SW + 2 * norms_SW * dots_SW
            squared_SW = (shares_SWW**2 @ grown_SW[:, :, None])[:, :, 0]
        else:
            dots_SW = (before_SWW @ kept_SW[:, :, None])[:, :, 0]
            grown_SW = kept_SW * (squares_SW + 2 * norms_SW * dots_SW)
            squared_SW = np.zeros_like(grown_SW)
            np.cumsum(grown_SW[:, :-1], axis=1, out=squared_SW[:, 1:])
        lengths_SW = np.sqrt(np.maximum(squared_SW, 0))
        return dots_SW, np.where(lengths_SW > 0, lengths_SW, _NO_LENGTH)

    @staticmethod
    def _shares(kept_SW: Array, counts_SW1: Array) -> Array:
        """Coefficients of midpoints in the workers kept, after so many of them: `[S, W, W]`, or `[S, 1, W]`.

        Each halves those before it, and the first has no other to share with.
        """
        counts_S1W = np.cumsum(kept_SW, axis=1)[:, None]
        return np.asarray(kept_SW[:, None] * np.exp2(counts_S1W - counts_SW1 - (counts_S1W > 1)))
