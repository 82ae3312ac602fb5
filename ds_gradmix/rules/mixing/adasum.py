import math
from typing import ClassVar

import torch
from torch import Tensor

from ds_gradmix.costs.model import RuleCost
from ds_gradmix.rules.base import GramianMixing, RngKey
from ds_gradmix.rules.decision import MixingDecision

_ROUNDING = (
    1e-6  # of its parts' squares: a node that is no longer is what rounding leaves of gradients that cancel
)
_LAUNCHES = (13, 17)  # whatever the number of workers, and for each level of the tree


class Adasum(GramianMixing):
    """Adaptive summation over a binary tree: orthogonal gradients are added, parallel ones averaged.

    Maleki et al. 2020, arXiv 2006.02924, as in Horovod: neighbours a and b, in the order of workers, become

        (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

    then neighbours of these, until one is left. **Weights do not sum to 1**: gradients of W workers that are
    nearly orthogonal are summed, not averaged, so the step is up to W times as long as that of a mean, and
    the learning rate has to be chosen for that. Identical workers give their gradient.

    Ours: any number of workers, where Horovod takes powers of two; an odd one out at the end of a level
    goes to the next level as it is. Workers that are left out are not in the tree. A zero vector leaves the
    other as it is, as in Horovod, where that is a square below 1e-8; here it is what rounding leaves,
    whatever the scale.
    """

    depends_on_order: ClassVar[bool] = True  # who is whose neighbour

    def cost(self, num_workers: int) -> RuleCost:
        """Small products, level by level."""
        fixed, of_level = _LAUNCHES
        return RuleCost(launches=fixed + of_level * math.ceil(math.log2(max(num_workers, 1))))

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]`: the root of the tree in terms of the workers' gradients."""
        # Zeros at the end leave the others as they are, and so does not being in the tree.
        order_W = torch.argsort(~present_W, stable=True)
        there_W = present_W[order_W].to(gram_SWW.dtype)
        gram_SWW = gram_SWW[:, order_W][:, :, order_W] * there_W * there_W[:, None]
        squares_SW1 = gram_SWW.diagonal(dim1=1, dim2=2)[:, :, None]
        # A node is a row of coefficients of the workers' gradients.
        nodes_SnW = torch.diag(there_W).expand_as(gram_SWW)
        while (num_nodes := nodes_SnW.shape[1]) > 1:
            pairs_SnW, odd_SnW = nodes_SnW.tensor_split([num_nodes // 2 * 2], dim=1)
            nodes_SnW = torch.cat([_sums_of_pairs(pairs_SnW, gram_SWW, squares_SW1), odd_SnW], dim=1)
        weights_SW = torch.empty_like(gram_SWW[:, 0])
        weights_SW[:, order_W] = nodes_SnW[:, 0]
        return MixingDecision(weights_SW, present_W.any().expand(len(weights_SW)))


def _sums_of_pairs(nodes_SnW: Tensor, gram_SWW: Tensor, squares_SW1: Tensor) -> Tensor:
    """The adaptive sums of rows 0 and 1, 2 and 3 and so on: half as many rows."""
    dots_SnW = nodes_SnW @ gram_SWW
    lengths_Sn = (dots_SnW * nodes_SnW).sum(2)
    parts_Sn = (nodes_SnW.square() @ squares_SW1)[:, :, 0]
    dots_Sn = (dots_SnW[:, ::2] * nodes_SnW[:, 1::2]).sum(2).repeat_interleave(2, dim=1)
    is_zero_Sn = lengths_Sn <= _ROUNDING * parts_Sn
    scaled_SnW = nodes_SnW * torch.where(is_zero_Sn, 1.0, 1.0 - 0.5 * dots_Sn / lengths_Sn)[:, :, None]
    return scaled_SnW[:, ::2] + scaled_SnW[:, 1::2]
