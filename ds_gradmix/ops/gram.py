"""The Gram matrix of a few long rows, in float64.

On a GPU rows of 16 bits are multiplied as they are: their products are exact in float32, in sums of 128, and
these sums are added in float64. (What bfloat16 holds beyond 1e19 has squares beyond float32, and below 1e-19
squares that are lost.) Rows of float32 are multiplied in float64, since TF32 would round them.

On a CPU most of the time of `mm(x.double(), x.double().t())` goes into writing and reading a copy that no
cache holds. So there the columns are taken 65,536 at a time; products are float32, in sums of 128, and these
sums are added in float64. They are off by up to 2e-7 for numbers of 8 bits, whose roundings have a bias, and
by less for others, where the rules tolerate 1e-6. Where a square would leave float32's range, or could be
lost below it, the columns are taken in float64 instead.

How a product is summed depends on its place in the matrix with some processors and libraries, so that the two
halves of the matrix may differ in their last digits; one is taken for both.
"""

import torch
from torch import Tensor

CACHED_COLUMNS = 1 << 16  # of a few rows, which a core's cache holds
_SUM = 128
_SMALLEST = 1e-30  # of a chunk's sum of squares: what float32 loses below 1e-38 is nothing beside it


def gram(values_WC: Tensor) -> Tensor:
    """`x x^T`, `[W, W]` in float64, of `[W, C]` in any dtype on any device."""
    if multiplies_16_bits(values_WC):
        blocks_BWK = _blocks(values_WC)
        products_BWW = torch.bmm(blocks_BWK, blocks_BWK.transpose(1, 2), out_dtype=torch.float32)
        return _symmetric(products_BWW.sum(0, dtype=torch.float64))
    if values_WC.device.type != "cpu" or values_WC.dtype == torch.float64:
        return exact_gram(values_WC)
    total_WW = values_WC.new_zeros(len(values_WC), len(values_WC), dtype=torch.float64)
    for chunk_WC in values_WC.split(CACHED_COLUMNS, dim=1):
        total_WW += _gram_of_chunk(chunk_WC)
    return _symmetric(total_WW)


def multiplies_16_bits(values_WC: Tensor) -> bool:
    """Whether 16-bit numbers are multiplied on this device with a result in float32."""
    in_16_bits = values_WC.is_cuda and values_WC.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and "dtype" in torch.ops.aten.bmm.overloads()


def exact_gram(values_WC: Tensor) -> Tensor:
    """The same by products in float64: no overflow, and no tensor-core rounding."""
    exact_WC = values_WC.double()
    return _symmetric(torch.mm(exact_WC, exact_WC.t()))


def _symmetric(found_WW: Tensor) -> Tensor:
    return found_WW.triu() + found_WW.triu(1).t()


def _gram_of_chunk(values_WC: Tensor) -> Tensor:
    blocks_BWK = _blocks(values_WC.float())
    found_WW = torch.bmm(blocks_BWK, blocks_BWK.transpose(1, 2)).sum(0, dtype=torch.float64)
    # By numpy, since these numbers are in the host's memory as they are.
    squares_W = found_WW.numpy().diagonal()
    if ((squares_W > _SMALLEST) & (squares_W < float("inf"))).all():
        return found_WW
    return exact_gram(values_WC)


def _blocks(values_WC: Tensor) -> Tensor:
    if values_WC.shape[1] % _SUM:
        values_WC = torch.nn.functional.pad(values_WC, (0, -values_WC.shape[1] % _SUM))
    blocks_WBK: Tensor = values_WC.unflatten(1, (-1, _SUM))
    return blocks_WBK.transpose(0, 1)
