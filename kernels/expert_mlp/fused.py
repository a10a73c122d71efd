"""An expert's MLP with its own backward pass: fewer temporaries, and row counts that repeat.

Experts get another number of tokens at every step, and oneDNN generates code for every shape it meets. So rows are
rounded up with zeros to one of 16 counts per power of two, once, and stay so through all six products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, silu

from megatron_m1.kernels.matmul import matmul


def round_up_rows(rows: int) -> int:
    """Round ``rows`` up to a count of at most 5 significant bits: at most a sixteenth more."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


class FusedExpertMlp(torch.autograd.Function):
    """See ``expert_mlp``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        """Output [m, hidden]."""
        rows = x.shape[0]
        extra = round_up_rows(rows) - rows if x.device.type == "cpu" else 0
        x, scale = pad(x, (0, 0, 0, extra)), pad(scale, (0, extra))
        projected = matmul(x, fc1.t())  # [m', 2 * ffn]
        gate, up = projected.chunk(2, dim=-1)
        weighted = (silu(gate).mul_(up) * scale.unsqueeze(-1)).to(x.dtype)  # [m', ffn]
        ctx.save_for_backward(x, scale, fc1, fc2, projected)
        ctx.rows, ctx.extra = rows, extra
        # Shrunk in place: a slice is a view, and what a custom function returns must not be one if it is written to.
        return matmul(weighted, fc2.t()).resize_(rows, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, scale, fc1 and fc2."""
        x, scale, fc1, fc2, projected = ctx.saved_tensors
        grad = pad(grads[0], (0, 0, 0, ctx.extra))  # [m', hidden]: zero rows add nothing to the weights' gradients
        gate, up = projected.chunk(2, dim=-1)
        weights = scale.unsqueeze(-1)
        opened = torch.sigmoid(gate)
        activated = gate * opened  # silu(gate)
        hidden = activated * up
        grad_weighted = matmul(grad, fc2)  # [m', ffn]
        grad_scale = torch.linalg.vecdot(grad_weighted.to(scale.dtype), hidden.to(scale.dtype))
        grad_fc2 = matmul(grad.t(), hidden.mul_(weights))
        grad_hidden = grad_weighted.mul_(weights)
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
        torch.mul(grad_hidden, activated, out=grad_up)
        # The derivative of silu is s + a (1 - s), a = gate s; torch's own backward of it is not vectorised.
        torch.mul(grad_hidden.mul_(up), torch.lerp(activated, opened.new_ones(()), opened), out=grad_gate)
        grad_fc1 = matmul(grad_projected.t(), x)
        grad_x = matmul(grad_projected, fc1)
        return grad_x[: ctx.rows], grad_scale[: ctx.rows], grad_fc1, grad_fc2
