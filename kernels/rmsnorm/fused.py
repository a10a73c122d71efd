"""RMSNorm with its own backward pass, in as few passes over memory as torch's operations allow."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedRmsNorm(torch.autograd.Function):
    """See ``rms_norm``. Keeps its inputs and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        """Output, shaped as ``x``."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, inverse)
        output = (x * inverse).mul_(weight)
        return output if gate is None else output.mul_(torch.sigmoid(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Gradients of x, weight and gate."""
        x, weight, gate, inverse = ctx.saved_tensors
        width = x.shape[-1]
        opened = None if gate is None else torch.sigmoid(gate)
        grad = grads[0] if opened is None else grads[0] * opened
        product = grad * x
        # [..., width] -> [n, width]
        grad_weight = inverse.flatten() @ product.view(-1, width)
        grad_normal = product.mul_(weight)
        projection = grad_normal.sum(dim=-1, keepdim=True)  # [..., 1]
        grad_x = (grad * weight).mul_(inverse)
        grad_x.addcmul_(x, projection * inverse.pow(3), value=-1.0 / width)
        if opened is None:
            return grad_x, grad_weight, None, None
        grad_gate = grad_normal.mul_(inverse)
        grad_gate.addcmul_(grad_gate, opened, value=-1.0)
        return grad_x, grad_weight, grad_gate, None
