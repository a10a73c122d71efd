"""RMSNorm with its own backward pass, in as few passes over memory as torch's operations allow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedRmsNorm(torch.autograd.Function):
    """See ``rms_norm`` and ``gated_rms_norm``. Keeps its inputs and one number per row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        eps: float,
        width: int,
        add_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Output [..., n], typed as ``x``; a row has ``width`` numbers over all ranks."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        total = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()  # [..., 1]
        if add_over_ranks is not None:
            total = add_over_ranks(total)
        inverse = total.div(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, inverse)
        ctx.width, ctx.add_over_ranks = width, add_over_ranks
        output = (wide * inverse).mul_(weight)
        if gate is not None:
            output.mul_(torch.sigmoid(gate.to(dtype)))
        return output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and gate."""
        x, weight, gate, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grads[0].to(inverse.dtype)
        opened = None if gate is None else torch.sigmoid(gate.to(inverse.dtype))
        if opened is not None:
            grad = grad * opened
        product = grad * wide
        with torch.autocast(x.device.type, enabled=False):
            # [..., n] -> [rows, n]
            grad_weight = inverse.flatten() @ product.reshape(-1, x.shape[-1])
        grad_normal = product.mul_(weight)
        projection = grad_normal.sum(dim=-1, keepdim=True)  # [..., 1]
        if ctx.add_over_ranks is not None:
            projection = ctx.add_over_ranks(projection)
        grad_x = (grad * weight).mul_(inverse)
        grad_x.addcmul_(wide, projection * inverse.pow(3), value=-1.0 / ctx.width)
        grad_gate = None
        if opened is not None:
            grad_gate = grad_normal.mul_(inverse)
            grad_gate = grad_gate.addcmul_(grad_gate, opened, value=-1.0).to(x.dtype)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_gate, None, None, None
