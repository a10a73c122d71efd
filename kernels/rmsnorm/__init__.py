"""RMSNorm over the last dimension, and over all heads of a token under a sigmoid gate.

README.md has the math, ``naive.py`` the truth, ``fused.py`` the form for CPUs, ``triton_norm.py`` the kernels for GPUs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.rmsnorm.fused import FusedRmsNorm
from megatron_m1.kernels.rmsnorm.naive import naive_gated_rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight``.

    Args:
        x: [..., width].
        weight: [width], ``x``'s dtype.
        eps: added to the mean square.

    Returns:
        [..., width] in ``x``'s dtype; statistics in fp32. Differentiable once in x and weight.

    Raises:
        ValueError: shapes not as above.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"x, weight are {list(x.shape)}, {list(weight.shape)}: give [..., width] and [width]")
    if x.device.type == "cpu" and x.dtype == torch.float32:
        result: Tensor = FusedRmsNorm.apply(x, weight, None, eps, x.shape[-1], None)
        return result
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    eps: float,
    *,
    width: int | None = None,
    add_over_ranks: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight * sigmoid(gate)``, the mean over all heads of a token.

    The heads of a token may be shared by ranks: each then gives its own heads, the full ``width``, and
    ``add_over_ranks``, to which the sum of squares of its heads is handed.

    Args:
        x: [T, H, D] float32, bfloat16 or float16 (float64 not with "triton"). Any strides, dense in D best.
        weight: [H * D], ``x``'s dtype.
        gate: [T, H, D], ``x``'s dtype; a view of the block's projection is read in place.
        eps: added to the mean square, finite and > 0.
        width: numbers of a token over all ranks that share it, at least H * D. Default: H * D.
        add_over_ranks: turns each rank's sums, float32 with a number for each token (float64 for float64 inputs), into
            the sums over the ranks, and may write to its argument. Called once in forward and once, on other sums, in
            backward; "naive" calls it in forward alone and differentiates through it. Default: no ranks.
        backend: "triton" (GPU), "chunk" (torch's operations) or "naive" (the formula); default
            ``choose_backend(x.device)``.

    Returns:
        [T, H, D] in ``x``'s dtype, contiguous; sums in float32. Differentiable once in x, weight and gate.

    Raises:
        ValueError: shapes, dtypes, eps or width not as above, tensors on several devices, or an unknown backend.

    Example:
        >>> x, gate = torch.randn(10, 2, 16), torch.randn(10, 2, 16)
        >>> gated_rms_norm(x, torch.ones(32), gate, 1e-6).shape
        torch.Size([10, 2, 16])
    """
    if x.dim() != 3 or gate.shape != x.shape or weight.shape != (x.shape[1] * x.shape[2],):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, gate))
        raise ValueError(f"x, weight, gate are {shapes}: give [T, H, D], [H * D] and [T, H, D]")
    if weight.numel() == 0:
        raise ValueError(f"x is {list(x.shape)}: a token needs numbers, H and D at least 1")
    if weight.dtype != x.dtype or gate.dtype != x.dtype:
        raise ValueError(f"x, weight, gate are {x.dtype}, {weight.dtype}, {gate.dtype}: give all three one dtype")
    if x.dtype not in DTYPES:
        raise ValueError(f"x, weight, gate are {x.dtype}: give float32, bfloat16, float16 or float64")
    if weight.device != x.device or gate.device != x.device:
        raise ValueError(f"x, weight, gate are on {x.device}, {weight.device}, {gate.device}: move them to one device")
    if not isinstance(eps, float | int) or not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}: give a finite number above 0")
    width = weight.numel() if width is None else width
    if not isinstance(width, int) or width < weight.numel():
        raise ValueError(f"width is {width}: give all ranks' numbers of a token, at least H * D = {weight.numel()}")
    name = choose_backend(x.device, backend)
    if name == "triton":
        from megatron_m1.kernels.rmsnorm.triton_norm import triton_gated_rms_norm

        return triton_gated_rms_norm(x, weight, gate, eps, width, add_over_ranks)
    if name == "naive":
        return naive_gated_rms_norm(x, weight, gate, eps, width, add_over_ranks)
    # [T, H, D] -> [T, H * D] -> [T, H, D]
    result: Tensor = FusedRmsNorm.apply(x.flatten(1), weight, gate.flatten(1), eps, width, add_over_ranks)
    return result.view(x.shape)
