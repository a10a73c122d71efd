"""The expert's MLP with its own backward pass against the formula in float64, at row counts that are rounded up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.expert_mlp import expert_mlp
from megatron_m1.kernels.expert_mlp.fused import round_up_rows
from megatron_m1.kernels.expert_mlp.naive import naive_expert_mlp

# fp32 sums of up to 600 terms, chained twice: their roundings add up as a random walk of about 50 steps.
TOLERANCE = 50 * 2.0**-24


def formula(x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    ffn = fc2.shape[1]
    gate, up = x @ fc1[:ffn].t(), x @ fc1[ffn:].t()
    return (gate / (1 + (-gate).exp()) * up * scale[:, None]) @ fc2.t()


def make(rows: int, hidden: int, ffn: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes: list[tuple[int, ...]] = [(rows, hidden), (2 * ffn, hidden), (hidden, ffn), (rows, hidden)]
    x, fc1, fc2, grad = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    return [x * hidden**0.5, torch.rand(rows, generator=generator), fc1, fc2], grad


@pytest.mark.parametrize("mlp", [expert_mlp, naive_expert_mlp])
@pytest.mark.parametrize(("rows", "hidden", "ffn"), [(0, 6, 5), (1, 6, 5), (17, 6, 5), (600, 70, 130)])
def test_equals_the_formula_in_float64(mlp, rows: int, hidden: int, ffn: int) -> None:  # type: ignore[no-untyped-def]
    arguments, grad = make(rows, hidden, ffn)
    results = []
    for dtype, run in ((torch.float32, mlp), (torch.float64, formula)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in arguments]
        output = run(*leaves)
        results.append([t.detach().double() for t in (output, *torch.autograd.grad(output, leaves, grad.to(dtype)))])
    for ours, true in zip(*results, strict=True):
        assert ours.shape == true.shape
        if true.numel():
            assert float((ours - true).abs().max()) <= TOLERANCE * float(true.abs().max())


def test_gradients_by_finite_differences() -> None:
    arguments, _ = make(5, 4, 3)
    assert torch.autograd.gradcheck(expert_mlp, [t.double().requires_grad_() for t in arguments])


def test_bfloat16_keeps_its_dtype_with_float32_probabilities() -> None:
    (x, scale, fc1, fc2), _ = make(9, 6, 5)
    low = [t.bfloat16().requires_grad_() for t in (x, fc1, fc2)]
    scale.requires_grad_()
    output = expert_mlp(low[0], scale, low[1], low[2])
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    reference = naive_expert_mlp(low[0], scale, low[1], low[2])
    torch.testing.assert_close(output, reference, rtol=2.0**-6, atol=2.0**-6)


def test_rounded_row_counts_are_few_and_near() -> None:
    counts = {round_up_rows(rows) for rows in range(1, 4097)}
    assert all(rows <= round_up_rows(rows) <= rows * 17 / 16 for rows in range(4097))
    assert len(counts) <= 16 * 12


def test_wrong_shapes_are_refused() -> None:
    (x, scale, fc1, fc2), _ = make(3, 6, 5)
    with pytest.raises(ValueError, match=r"\[2 ffn, hidden\]"):
        expert_mlp(x, scale, fc1[:9], fc2)
