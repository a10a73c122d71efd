"""An expert's MLP as it is written down, under autograd: the truth."""

import torch
from torch import Tensor


def naive_expert_mlp(x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """Arguments and result as in ``expert_mlp``."""
    gate, up = (x @ fc1.t()).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return (hidden * scale.unsqueeze(-1)).to(x.dtype) @ fc2.t()
