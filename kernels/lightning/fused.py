"""Lightning attention of SiLU(q), SiLU(k), SiLU(v) out of one projection, as in MiniMax-M1's block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.checks import check_cu_seqlens, check_heads
from megatron_m1.kernels.lightning.forms import find_form


def silu_lightning_attention(
    parts: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``lightning_attention`` of SiLU(q), SiLU(k), SiLU(v), read from and differentiated into one tensor.

    On GPUs the kernels apply SiLU to what they load and its derivative to what they store, and read q, k and v where
    they are; nothing is copied, and only ``parts`` is kept for backward.

    Args:
        parts: [T, H, P, D], P >= 3: q, k, v of each head, then P - 3 parts that ride along, such as the output gate.
        slopes: [H] float32, as in ``lightning_attention``; so are cu_seqlens and backend.
        cu_seqlens: [N + 1] document bounds.
        backend: name, or None for the device's fastest.

    Returns:
        o [T, H, D], and the parts that rode along, [T, H, P - 3, D], a view on GPUs. Differentiable once.

    Raises:
        ValueError: as ``lightning_attention``; parts of another rank or with fewer than 3 parts.

    Example:
        >>> o, gate = silu_lightning_attention(torch.randn(10, 2, 4, 16), torch.ones(2), cu_seqlens=[0, 3, 10])
        >>> o.shape, gate.shape
        (torch.Size([10, 2, 16]), torch.Size([10, 2, 1, 16]))
    """
    if parts.dim() != 4 or parts.shape[2] < 3:
        raise ValueError(f"parts have shape {tuple(parts.shape)}: give [T, H, P, D] with P >= 3")
    q, k, v = parts[:, :, :3].unbind(2)  # [T, H, D]
    check_heads(q, k, v, slopes)
    bounds = check_cu_seqlens(cu_seqlens, parts.shape[0])
    name = choose_backend(parts.device, backend)
    if name == "triton":
        from megatron_m1.kernels.lightning.triton_attention import triton_silu_attention

        return triton_silu_attention(parts, slopes, bounds)
    run = find_form(name, parts.device)
    q, k, v = (torch.nn.functional.silu(x) for x in (q, k, v))
    with torch.autocast(parts.device.type, enabled=False):
        o, _ = run(Call(q, k, v, slopes, tuple(bounds)))
    return o, parts[:, :, 3:]
