"""RMSNorm over the last dimension, optionally under a sigmoid gate. README.md has the math; ``naive.py`` the truth."""

import torch
from torch import Tensor

from megatron_m1.kernels.rmsnorm.fused import FusedRmsNorm
from megatron_m1.kernels.rmsnorm.naive import naive_rms_norm

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight``, times ``sigmoid(gate)`` if there is one.

    Args:
        x: [..., width].
        weight: [width], ``x``'s dtype.
        eps: added to the mean square.
        gate: ``x``'s shape and dtype, any strides.

    Returns:
        [..., width] in ``x``'s dtype; statistics in fp32. Differentiable once in x, weight and gate.

    Raises:
        ValueError: shapes not as above.
    """
    if weight.shape != x.shape[-1:] or (gate is not None and gate.shape != x.shape):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, gate) if t is not None)
        raise ValueError(f"x, weight, gate are {shapes}: give [..., width], [width], and a gate of x's shape")
    if x.device.type == "cpu" and x.dtype == torch.float32:
        result: Tensor = FusedRmsNorm.apply(x, weight, gate, eps)
        return result
    return naive_rms_norm(x, weight, eps, gate)
