"""The RMSNorm with its own backward pass against the formula in float64 and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.rmsnorm import rms_norm
from megatron_m1.kernels.rmsnorm.fused import FusedRmsNorm

# Two hundred fp32 roundings of numbers of order one, most of them in sums of 37 * 5 terms.
TOLERANCE = 200 * 2.0**-24
SHAPE = (5, 1, 37)


def formula(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    normal = weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    return normal if gate is None else normal / (1 + (-gate).exp())


def inputs(gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(SHAPE, generator=generator, dtype=dtype)
    weight = 1 + torch.randn(SHAPE[-1], generator=generator, dtype=dtype)
    gate = torch.randn((*SHAPE, 2), generator=generator, dtype=dtype)[..., 0] if gated else None
    return x, weight, gate


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_the_formula_in_float64(gated: bool, eps: float) -> None:
    x, weight, gate = inputs(gated, torch.float32)
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype, norm in ((torch.float32, rms_norm), (torch.float64, formula)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, weight, gate) if t is not None]
        output = norm(leaves[0], leaves[1], eps, leaves[2] if gated else None)
        gradients = torch.autograd.grad(output, leaves, grad.to(dtype))
        results.append([t.detach().double() for t in (output, *gradients)])
    for ours, true in zip(*results, strict=True):
        assert float((ours - true).abs().max()) <= TOLERANCE * float(true.abs().max())


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_by_finite_differences(gated: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(gated, torch.float64) if t is not None]
    no_gate = () if gated else (None,)
    assert torch.autograd.gradcheck(lambda *args: FusedRmsNorm.apply(*args, *no_gate, 1e-3), leaves)


def test_bfloat16_has_float32_statistics() -> None:
    x, weight, gate = inputs(True, torch.bfloat16)
    assert gate is not None
    result = rms_norm(x, weight, 1e-5, gate)
    true = formula(x.double(), weight.double(), 1e-5, gate.double())
    assert result.dtype == torch.bfloat16
    # Four roundings to 8 bits: the normal, its product with the weight, the sigmoid, and the result.
    torch.testing.assert_close(result.double(), true, rtol=4 * 2.0**-8, atol=0)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 1, 37\], \[36\]"):
        rms_norm(torch.ones(SHAPE), torch.ones(36), 1e-5)
    with pytest.raises(ValueError, match="a gate of x's shape"):
        rms_norm(torch.ones(SHAPE), torch.ones(37), 1e-5, torch.ones(5, 37))
