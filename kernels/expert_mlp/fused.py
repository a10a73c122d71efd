"""An expert's MLP with its own backward pass, which has fewer temporaries than autograd's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.expert_mlp.passes import Kept, data_pass, forward_pass, weight_gradient


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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, scale, fc1 and fc2; of weights that need none, None."""
        x, scale, projected, *weights = ctx.saved_tensors
        fc1, fc2 = (w if needed else w.detach() for w, needed in zip(weights, ctx.needs_input_grad[2:], strict=True))
        kept = Kept(x, scale, projected, ctx.rows)
        grad_x, grad_scale, pending = data_pass(kept, fc1, fc2, grads[0])
        made = (None if factors is None else weight_gradient(factors) for factors in (pending.fc1, pending.fc2))
        return grad_x, grad_scale, *made
