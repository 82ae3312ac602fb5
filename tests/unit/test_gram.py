"""The Gram matrix of rows, against products and sums in float64."""

from __future__ import annotations

import pytest
import torch

from ds_gradmix.ops.gram import exact_gram, gram

COLUMNS = 150_001  # two chunks and a half, and an odd one


def rows(num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    common = torch.randn(COLUMNS, generator=generator)
    return (common + torch.randn(num_rows, COLUMNS, generator=generator)).to(dtype)


def error(values_WC: torch.Tensor) -> float:
    """The largest, in units of the product of the two rows' norms."""
    wanted = exact_gram(values_WC)
    norms = wanted.diagonal().sqrt()
    scale = (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((gram(values_WC) - wanted).abs() / scale).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 40])
def test_error_is_far_below_gafs_tolerance(num_rows: int, dtype: torch.dtype) -> None:
    bound = {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 2e-7)
    assert error(rows(num_rows, dtype)) < bound


@pytest.mark.parametrize("num_rows", [2, 3, 5, 8, 16])
def test_it_is_symmetric_and_rows_that_are_equal_have_equal_products(num_rows: int) -> None:
    """The latter to rounding, which is another one with some processors."""
    values_WC = rows(num_rows)
    values_WC[-1] = values_WC[0]
    for found in (gram(values_WC), gram(values_WC.double())):
        assert torch.equal(found, found.t())
        assert torch.allclose(found[0], found[-1], rtol=2e-7, atol=2e-7 * float(found[0, 0]))


@pytest.mark.parametrize("scale", [1e-25, 1e-40, 1e25, 1e38])
def test_no_scale_overflows_or_is_lost(scale: float) -> None:
    values_WC = rows(4).clamp(-3, 3) * scale
    assert error(values_WC) < 1e-7
    mixed_WC = rows(4)
    mixed_WC[1] *= scale / 4
    mixed_WC[2, 1000:] = 0.0
    mixed_WC[3] = 0.0
    assert error(mixed_WC) < 1e-7


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_in_its_row_alone(bad: float) -> None:
    values_WC = rows(4)
    values_WC[1, 70_000] = bad
    finite = gram(values_WC).isfinite()
    assert not finite[1].any() and not finite[:, 1].any()
    assert finite[[0, 2, 3]][:, [0, 2, 3]].all()


def test_no_columns() -> None:
    assert torch.equal(gram(torch.empty(3, 0)), torch.zeros(3, 3, dtype=torch.float64))
