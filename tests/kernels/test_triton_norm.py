"""RMSNorm under a gate: the Triton kernels under the interpreter against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.rmsnorm.gated import gated_rms_norm, naive_gated_rms_norm


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_formula(dtype: torch.dtype, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 3, 20), (60,), (70, 3, 4, 20)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grad = torch.randn(70, 3, 20, generator=generator).to(dtype)

    # As if every rank held the same rows.
    def add(total: Tensor) -> Tensor:
        return total * ranks

    outcomes = []
    for wide in (False, True):
        leaves = [x.to(torch.float64 if wide else dtype).detach().requires_grad_() for x in tensors]
        x, weight, parts = leaves
        if wide:
            y = naive_gated_rms_norm(x, weight, parts[:, :, 3], 1e-3, 60 * ranks, add)
        else:
            shared = None if ranks == 1 else add
            y = gated_rms_norm(
                x, weight, parts[:, :, 3], 1e-3, width=60 * ranks, add_over_ranks=shared, backend="triton"
            )
        outcomes.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    # One rounding of the result; sums of 70 products in float32.
    relative = 70 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0.0)
    for actual, expected in zip(*outcomes, strict=True):
        assert actual.dtype == dtype
        error, scale = (actual.double() - expected).norm(), expected.norm()
        assert bool(error <= relative * scale), float(error / scale)


def test_shapes_are_checked() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"\[2, 3, 4\], \[4\]"):
        gated_rms_norm(x, torch.zeros(4), x, 1e-6)
