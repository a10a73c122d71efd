"""An expert's MLP with its own backward pass, which has fewer temporaries than autograd's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.expert_mlp.passes import Kept, data_pass, forward_pass, weights_pass


class FusedExpertMlp(torch.autograd.Function):
    """See ``expert_mlp``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        """Output [m, hidden]."""
        output, kept = forward_pass(x, scale, fc1, fc2)
        ctx.save_for_backward(kept.x, kept.scale, kept.projected, fc1, fc2)
        ctx.rows = kept.rows
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, scale, fc1 and fc2."""
        x, scale, projected, fc1, fc2 = ctx.saved_tensors
        kept = Kept(x, scale, projected, ctx.rows)
        grad_x, grad_scale, pending = data_pass(kept, fc1, fc2, grads[0])
        return grad_x, grad_scale, *weights_pass(pending)
