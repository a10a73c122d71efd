"""RMSNorm under a sigmoid gate by heads, over a width that ranks may share."""

from collections.abc import Callable

import torch
from torch import Tensor


def naive_gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor, eps: float, width: int, add_over_ranks: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The formula under autograd. ``add_over_ranks`` must be differentiable here."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(dtype).flatten(1)  # [T, H, D] -> [T, H * D]
    total = wide.square().sum(dim=1)
    if add_over_ranks is not None:
        total = add_over_ranks(total)
    normal = wide * torch.rsqrt(total / width + eps)[:, None] * weight.to(dtype)
    return (normal * torch.sigmoid(gate.to(dtype).flatten(1))).to(x.dtype).view_as(x)


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

    Args:
        x: [T, H, D] float32, bfloat16 or float16 (float64 with "naive"). Any strides, dense in D best.
        weight: [H * D], ``x``'s dtype.
        gate: [T, H, D], ``x``'s dtype; a view of the block's projection is read in place.
        eps: added to the mean square.
        width: numbers of a token over all ranks that share it. Default: H * D.
        add_over_ranks: turns each rank's sum of squares [T] float32 into the sum over the ranks. "triton" calls it once
            in forward and once, on another sum, in backward; "naive" differentiates through it. Default: no ranks.
        backend: "triton", "naive", or None for the device's fastest.

    Returns:
        [T, H, D] in ``x``'s dtype, sums in float32. Differentiable once in x, weight and gate.

    Raises:
        ValueError: shapes not as above, or an unknown backend.
    """
    if x.dim() != 3 or gate.shape != x.shape or weight.shape != (x.shape[1] * x.shape[2],):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, gate))
        raise ValueError(f"x, weight, gate are {shapes}: give [T, H, D], [H * D] and [T, H, D]")
    name = backend or ("triton" if x.device.type == "cuda" else "naive")
    width = weight.numel() if width is None else width
    if name == "naive":
        return naive_gated_rms_norm(x, weight, gate, eps, width, add_over_ranks)
    if name == "triton":
        from megatron_m1.kernels.rmsnorm.triton_norm import triton_gated_rms_norm

        return triton_gated_rms_norm(x, weight, gate, eps, width, add_over_ranks)
    raise ValueError(f"unknown backend {name!r}: use 'triton', 'naive' or None")
