"""RMSNorm by its formula, under autograd: what the other forms are compared with."""

from collections.abc import Callable

import torch
from torch import Tensor


def naive_gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor, eps: float, width: int, add_over_ranks: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Arguments and result as in ``gated_rms_norm``, already checked; differentiates through ``add_over_ranks``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype).flatten(1)  # [T, H, D] -> [T, H * D]
    total = wide.square().sum(dim=1, keepdim=True)  # [T, 1]
    if add_over_ranks is not None:
        total = add_over_ranks(total)
    normal = wide * torch.rsqrt(total / width + eps) * weight.to(dtype)
    gated = normal * torch.sigmoid(gate.to(dtype).flatten(1))
    return gated.to(x.dtype).view_as(x)  # [T, H * D] -> [T, H, D]
