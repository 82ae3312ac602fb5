"""Sums and Gram matrices by parameter against a loop over parameters, for random divisions of the columns."""

from __future__ import annotations

import pytest
import torch

from ds_gradmix.ops.segments import Segments, weighted_sum

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(30))
def test_against_loops(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    num_runs = int(torch.randint(1, 40, (), generator=random))
    scale = [3, 60, 700, 9000][seed % 4]
    lengths = torch.randint(0, scale, (num_runs,), generator=random).tolist()
    num_segments = int(torch.randint(1, 8, (), generator=random))
    ids = torch.randint(0, num_segments, (num_runs,), generator=random).tolist()
    rows = 1 + seed % 5
    values = torch.randn(rows, sum(lengths), generator=random)
    segments = Segments(ids, lengths, num_segments, CPU, rows)
    of_column = torch.tensor(ids).repeat_interleave(torch.tensor(lengths))
    for s in range(num_segments):
        part = values[:, of_column == s].double()
        wanted = part @ part.t()
        norms = wanted.diagonal().sqrt()
        close = (segments.gram(values)[s] - wanted).abs() <= 1e-7 * norms[:, None] * norms
        assert close.all()
        torch.testing.assert_close(segments.sum(values[0])[s], part[0].sum())
    given = torch.randn(2, num_segments, generator=random)
    expected = given[:, of_column]
    torch.testing.assert_close(segments.expand(given).expand(2, sum(lengths)), expected)


def test_values_that_are_not_finite_affect_their_parameter_only() -> None:
    segments = Segments([0, 1, 2], [100, 30, 300], 3, CPU, 2)
    values = torch.ones(2, 430)
    values[0, 110] = float("nan")
    assert segments.gram(values).isfinite().all(-1).all(-1).tolist() == [True, False, True]
    assert segments.sum(values[0]).isfinite().tolist() == [True, False, True]


def test_gram_by_segment_is_float64_from_bfloat16() -> None:
    """The error of a bf16 or float32 product would be 1e-3 or 1e-7, and 1e30 squared overflows float32."""
    values = torch.randn(3, 5000).bfloat16()
    segments = Segments([0, 1], [3000, 2000], 2, CPU, 3)
    for found, part in zip(segments.gram(values), values.double().split([3000, 2000], 1), strict=True):
        torch.testing.assert_close(found, part @ part.t(), rtol=1e-14, atol=0)
    assert segments.gram(values * 1e30).isfinite().all()


def test_weighted_sum() -> None:
    values, weights = torch.randn(3, 50), torch.rand(3, 50)
    torch.testing.assert_close(weighted_sum(values, weights), (values * weights).sum(0))
    torch.testing.assert_close(weighted_sum(values, weights[:, :1]), (values * weights[:, :1]).sum(0))
