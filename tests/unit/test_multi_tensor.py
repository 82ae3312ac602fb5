"""apex's kernels and torch's give equal results; a module with amp_C's own signatures stands in for apex."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_gradmix.cli import main
from ds_gradmix.ops import multi_tensor


class AmpC(ModuleType):
    """`amp_C` as apex's csrc/amp_C_frontend.cpp declares it, on a CPU."""

    def __init__(self) -> None:
        super().__init__("amp_C")
        self.calls: list[str] = []

    def multi_tensor_l2norm(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool
    ) -> tuple[Tensor, Tensor]:
        assert chunk > 0 and flag.dtype == torch.int32 and len(lists) == 1 and per_tensor
        self.calls.append("l2norm")
        assert len({t.dtype for t in lists[0]}) == 1
        each = torch.stack([t.float().norm() for t in lists[0]])
        return each.norm().view(1), each

    def multi_tensor_axpby(
        self, chunk: int, flag: Tensor, lists: list[list[Tensor]], a: float, b: float, check: int
    ) -> None:
        assert chunk > 0 and flag.dtype == torch.int32 and check == -1
        self.calls.append("axpby")
        assert all(len({t.dtype for t in tensors}) == 1 for tensors in lists)
        for x, y, out in zip(*lists, strict=True):
            out.copy_(a * x.float() + b * y.float())


@pytest.fixture(params=["amp_C", "foreach"])
def apex(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[AmpC | None]:
    stand_in = AmpC() if request.param == "amp_C" else None
    monkeypatch.setitem(sys.modules, "amp_C", stand_in)  # None: cannot be imported
    monkeypatch.setattr(multi_tensor, "_is_cuda", lambda _: True)
    multi_tensor.amp_c.cache_clear()
    yield stand_in
    multi_tensor.amp_c.cache_clear()


def some(dtype: torch.dtype, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random).to(dtype) for size in (7, 1, 4097)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms(apex: AmpC | None, dtype: torch.dtype) -> None:
    tensors = some(dtype, 1)
    found = multi_tensor.norms(tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([t.double().norm() for t in tensors]).float())
    assert apex is None or apex.calls == ([] if dtype == torch.bfloat16 else ["l2norm"])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("a, b", [(1.0, 1.0), (0.1, 0.9)])
def test_axpby(apex: AmpC | None, x_dtype: torch.dtype, a: float, b: float) -> None:
    xs, ys = some(x_dtype, 1), some(torch.float32, 2)
    expected = [a * x.float() + b * y for x, y in zip(xs, ys, strict=True)]
    multi_tensor.axpby_(a, xs, b, ys)
    for y, wanted in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, wanted)
    assert apex is None or apex.calls == ([] if x_dtype == torch.bfloat16 else ["axpby"])


def test_dtypes_in_one_list(apex: AmpC | None) -> None:
    mixed = [torch.ones(3), torch.ones(3, dtype=torch.float16)]
    assert multi_tensor.norms(mixed).tolist() == pytest.approx([3**0.5] * 2)
    multi_tensor.axpby_(2.0, mixed, 1.0, ys := [torch.ones(3), torch.ones(3)])
    assert all(y.tolist() == [3.0] * 3 for y in ys)
    assert apex is None or apex.calls == []


def test_more_elements_than_32_bits_count(apex: AmpC | None) -> None:
    huge = torch.zeros(2**31, device="meta")
    assert multi_tensor._usable_amp_c([huge]) is None
    assert (multi_tensor._usable_amp_c([huge[:-1]]) is None) == (apex is None)


def test_nothing_and_tensors_without_elements(apex: AmpC | None) -> None:
    assert multi_tensor.norms([torch.zeros(0), torch.ones(4)]).tolist() == [0, 2]
    multi_tensor.axpby_(1.0, [], 1.0, [])


def test_describe_gives_the_reason_of_a_failed_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "amp_C.py").write_text("raise RuntimeError('built for another CUDA')")
    monkeypatch.syspath_prepend(str(tmp_path))
    multi_tensor.amp_c.cache_clear()
    assert multi_tensor.describe() == "torch._foreach (amp_C: built for another CUDA)"
    multi_tensor.amp_c.cache_clear()


def test_env_names_the_kernels(apex: AmpC | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = map(str.strip, capsys.readouterr().out.splitlines())
    line = next(line for line in lines if line.startswith("multi-tensor"))
    assert line.split(maxsplit=1)[1].startswith(
        "torch._foreach (" if apex is None else "amp_C of NVIDIA apex"
    )


def test_squares_of_what_is_finite_are_finite() -> None:
    huge, tiny = torch.full((10,), 1e20), torch.full((10,), 1e-30, dtype=torch.bfloat16)
    expected = [float(values.double().square().sum()) for values in (huge, tiny)]
    assert multi_tensor.squares([huge, tiny]).tolist() == pytest.approx(expected, rel=1e-12)
