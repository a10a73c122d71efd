"""RMSNorm, alone and under a gate, in torch's operations and in Triton's, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.tolerances import KERNEL_DTYPES, rounded
from megatron_m1.kernels.rmsnorm import gated_rms_norm, rms_norm
from megatron_m1.kernels.rmsnorm.fused import FusedRmsNorm

TOKENS, HEADS, HEAD_DIM = 70, 3, 20
WIDTH = HEADS * HEAD_DIM
DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["fp32", "bf16", "fp16"])


def formula(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, copies: int = 1) -> Tensor:
    """Over ``copies`` times the width, as if other ranks had the same numbers."""
    flat = x.flatten(1)
    normal = weight * flat / (copies * flat.pow(2).sum(dim=1, keepdim=True) / (copies * flat.shape[1]) + eps).sqrt()
    return (normal if gate is None else normal / (1 + (-gate.flatten(1)).exp())).view(x.shape)


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x [T, H, D], weight [H D], the gate as the last of four parts [T, H, 4, D]; the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HEADS, HEAD_DIM), (WIDTH,), (TOKENS, HEADS, 4, HEAD_DIM)]
    x, weight, parts = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [3 * x, 1 + weight, parts], torch.randn(shapes[0], generator=generator).to(dtype)


def outcome(form: object, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients of ``form(x, weight, gate)``."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert callable(form)
    y = form(leaves[0], leaves[1], leaves[2][:, :, 3])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for ours, true in zip(actual, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, scale = float((ours.double() - true).norm()), float(true.norm())
        assert error <= rounded(dtype, TOKENS, WIDTH) * scale, error / scale


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("backend", ["naive", "chunk", "triton"])
@pytest.mark.parametrize("ranks", [1, 2])
@DTYPES
def test_gated_norm_equals_the_formula(dtype: torch.dtype, ranks: int, backend: str) -> None:
    """Alone, and with a second rank that has the same numbers: then every sum over the width is twice one rank's."""
    leaves, grad = inputs(dtype)
    add = None if ranks == 1 else lambda sums: sums * ranks
    ours = outcome(
        lambda x, weight, gate: gated_rms_norm(
            x, weight, gate, 1e-3, width=WIDTH * ranks, add_over_ranks=add, backend=backend
        ),
        leaves,
        grad,
    )
    wide = [x.double() for x in leaves]
    true = outcome(lambda x, weight, gate: formula(x, weight, 1e-3, gate, ranks), wide, grad.double())
    assert_close(ours, true, dtype)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_equals_the_formula(dtype: torch.dtype, eps: float) -> None:
    leaves, grad = inputs(dtype)
    x, grad = leaves[0].flatten(1), grad.flatten(1)
    outcomes = []
    for form, of in ((rms_norm, dtype), (formula, torch.float64)):
        pair = [t.detach().to(of).requires_grad_() for t in (x, leaves[1])]
        y = form(pair[0], pair[1], eps)
        outcomes.append([y.detach(), *torch.autograd.grad(y, pair, grad.to(of))])
    if dtype == torch.float32:
        assert_close(outcomes[0], outcomes[1], dtype)
    else:
        # torch's own backward in bfloat16 rounds between its operations, so its result alone is compared.
        assert_close(outcomes[0][:1], outcomes[1][:1], dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_by_finite_differences(gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 37), (37,), (5, 37)] if gated else [(5, 37), (37,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    no_gate = () if gated else (None,)
    assert torch.autograd.gradcheck(lambda *args: FusedRmsNorm.apply(*args, *no_gate, 1e-3, 37, None), leaves)


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(5, 2, 4)
    with pytest.raises(ValueError, match=r"\[5, 2, 4\], \[3\]"):
        rms_norm(x, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match=r"\[5, 2, 4\], \[4\], \[5, 2, 4\]"):
        gated_rms_norm(x, torch.ones(4), x, 1e-6)
    with pytest.raises(ValueError, match=r"\[5, 2, 4\], \[8\], \[5, 8\]"):
        gated_rms_norm(x, torch.ones(8), torch.ones(5, 8), 1e-6)
    with pytest.raises(ValueError, match=r"float32, torch\.bfloat16"):
        gated_rms_norm(x, torch.ones(8).bfloat16(), x, 1e-6)
    good: dict[str, Any] = dict(x=x, weight=torch.ones(8), gate=x, eps=1e-6)
    for change, message in (
        (dict(gate=x.to("meta")), "on cpu, cpu, meta: move"),
        (dict(eps=0.0), "eps is 0.0"),
        (dict(eps=float("nan")), "eps is nan"),
        (dict(eps="1e-6"), "eps is '1e-6'"),
        (dict(width=float("nan")), "width is nan"),
        (dict(x=x[:, :0], weight=torch.ones(0), gate=x[:, :0]), r"\[5, 0, 4\]: a token needs numbers"),
        (dict(width=0), "width is 0: .* = 8"),
        (dict(x=x.long(), weight=torch.ones(8).long(), gate=x.long()), r"torch\.int64: give float32"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(**(good | change))
    with pytest.raises(ValueError, match="'tritn'"):
        gated_rms_norm(x, torch.ones(8), x, 1e-6, backend="tritn")
