"""The matrix product against float64, on both sides of the choice of library."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.kernels.matmul import matmul, matmul_add_
from megatron_m1.kernels.matmul.onednn import onednn_matmul, onednn_serves

# A float32 sum of k products of unit normals errs by at most k * 2**-24 of the sum of their magnitudes.
UNIT = 2.0**-24


def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What each entry of ``a @ b`` may be off by."""
    return (a.double().abs() @ b.double().abs()) * a.shape[1] * UNIT


def make(m: int, k: int, n: int, transposed: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randn((k, m), generator=generator).t() if "a" in transposed else torch.randn((m, k), generator=generator)
    b = torch.randn((n, k), generator=generator).t() if "b" in transposed else torch.randn((k, n), generator=generator)
    return a, b


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (129, 131, 127), (300, 257, 65), (65, 257, 300), (0, 4, 3), (2, 0, 3)])
def test_equals_float64(shape: tuple[int, int, int], transposed: str) -> None:
    a, b = make(*shape, transposed)
    result = matmul(a, b)
    assert result.is_contiguous()
    assert bool(((result.double() - a.double() @ b.double()).abs() <= rounding(a, b)).all())


def test_large_float32_products_take_onednn_and_others_do_not() -> None:
    large = torch.ones(128, 128)
    assert onednn_serves(large, large) == torch.backends.mkldnn.is_available()
    assert not onednn_serves(large[:, :127], large[:127])
    assert not onednn_serves(large.bfloat16(), large.bfloat16())


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_onednn_takes_all_strides(transposed: str) -> None:
    a, b = make(12, 5, 9, transposed)
    assert bool(((onednn_matmul(a, b).double() - a.double() @ b.double()).abs() <= rounding(a, b)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (129, 131, 127), (2, 0, 3)])
def test_adds_in_place_in_the_totals_precision(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in make(*shape, "a"))
    before = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(5))
    total = before.t().contiguous().t()  # not contiguous
    assert matmul_add_(total, a, b) is total
    exact = a.double() @ b.double() + before.double()
    bound = rounding(a, b) + exact.abs() * 2 * UNIT
    if dtype == torch.bfloat16:
        bound += (exact - before.double()).abs() * 2.0**-8  # the product is rounded to bf16
    assert total.dtype == torch.float32
    assert bool(((total.double() - exact).abs() <= bound + before.double().abs() * UNIT).all())
