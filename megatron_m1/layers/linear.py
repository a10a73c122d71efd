"""megatron-core's parallel linears, computing their products with ``kernels.matmul``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_m1.kernels.matmul import matmul


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        return matmul(grad, weight), matmul(grad.t(), x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in] transposed: [..., out], differentiable in both."""
    # [..., in] -> [n, in] -> [n, out] -> [..., out]
    product: Tensor = _Linear.apply(x.flatten(0, -2), weight)
    return product.view(*x.shape[:-1], -1)


class CpuColumnParallelLinear(ColumnParallelLinear):
    """``ColumnParallelLinear``; only products without a collective differ."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if how["sequence_parallel"] or how["allreduce_dgrad"]:
            # The library's own function overlaps these collectives with the products.
            return super()._forward_impl(input, weight, **how)
        return linear(input, weight)


class CpuRowParallelLinear(RowParallelLinear):
    """``RowParallelLinear``; only the product differs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        return linear(input, weight)
