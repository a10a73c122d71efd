"""The expert's MLP with its own backward pass against the formula in float64, at row counts that are rounded up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.expert_mlp import expert_mlp
from megatron_m1.kernels.expert_mlp.naive import naive_expert_mlp
from megatron_m1.kernels.expert_mlp.passes import round_up_rows
from tests.tolerances import chained

ROUNDINGS = 10
"""In 16 bits on the way to a gradient: projected (which SiLU may stretch to two), opened, activated, the slope of SiLU,
grad_weighted, three factors, and the result."""


def tolerance(dtype: torch.dtype, rows: int, hidden: int, ffn: int) -> float:
    """The longest way: fc1, then fc2 backwards, then a sum over rows or over both halves of fc1."""
    return chained([hidden, hidden, max(rows, 2 * ffn)], dtype, roundings=0 if dtype == torch.float32 else ROUNDINGS)


def formula(x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    ffn = fc2.shape[1]
    gate, up = x @ fc1[:ffn].t(), x @ fc1[ffn:].t()
    return (gate / (1 + (-gate).exp()) * up * scale[:, None]) @ fc2.t()


def make(rows: int, hidden: int, ffn: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes: list[tuple[int, ...]] = [(rows, hidden), (2 * ffn, hidden), (hidden, ffn), (rows, hidden)]
    x, fc1, fc2, grad = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    return [x * hidden**0.5, torch.rand(rows, generator=generator), fc1, fc2], grad


def outcome(mlp: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, scale, fc1 and fc2."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    output = mlp(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def compare(mlp: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor, truth: Callable[..., Tensor]) -> None:
    """Output and every gradient against ``truth`` in float64, by the norm."""
    found = outcome(mlp, arguments, grad)
    expected = outcome(truth, [t.double() for t in arguments], grad.double())
    (rows, hidden), ffn = arguments[0].shape, arguments[3].shape[1]
    bound = tolerance(grad.dtype, rows, hidden, ffn)
    for name, ours, true in zip(("output", "x", "scale", "fc1", "fc2"), found, expected, strict=True):
        assert ours.shape == true.shape
        assert (ours.double() - true).norm() <= bound * true.norm(), name


@pytest.mark.parametrize("mlp", [expert_mlp, naive_expert_mlp])
@pytest.mark.parametrize(("rows", "hidden", "ffn"), [(0, 6, 5), (1, 6, 5), (17, 6, 5), (600, 70, 130)])
def test_equals_the_formula_in_float64(mlp: Callable[..., Tensor], rows: int, hidden: int, ffn: int) -> None:
    compare(mlp, *make(rows, hidden, ffn), formula)


@pytest.mark.parametrize(("rows", "hidden", "ffn"), [(1, 6, 5), (9, 6, 5), (130, 70, 33)])
def test_bfloat16_equals_naive_in_float64(rows: int, hidden: int, ffn: int) -> None:
    """Output and every gradient; the probabilities stay float32."""
    (x, scale, fc1, fc2), grad = make(rows, hidden, ffn)
    compare(expert_mlp, [x.bfloat16(), scale, fc1.bfloat16(), fc2.bfloat16()], grad.bfloat16(), naive_expert_mlp)


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


def test_rounded_row_counts_are_few_and_near() -> None:
    counts = {round_up_rows(rows) for rows in range(1, 4097)}
    assert all(rows <= round_up_rows(rows) <= rows * 17 / 16 for rows in range(4097))
    assert len(counts) <= 16 * 12


def test_wrong_shapes_are_refused() -> None:
    (x, scale, fc1, fc2), _ = make(3, 6, 5)
    with pytest.raises(ValueError, match=r"\[2 ffn, hidden\]"):
        expert_mlp(x, scale, fc1[:9], fc2)
