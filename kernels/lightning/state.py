"""The state that the tokens of a document alone leave: what ranks that share the document send each other."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.lightning.checks import check_cu_seqlens, check_heads
from megatron_m1.kernels.lightning.naive import state_dtype


def lightning_state(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The states that these tokens alone leave in their documents: sum over t of exp(-s (n - 1 - t)) k_t^T v_t.

    A document of n tokens that was entered with a state S leaves exp(-s n) S plus this.

    Args:
        k: keys [T, H, Dk], as in ``lightning_attention``; so are v, slopes, cu_seqlens and backend.
        v: values [T, H, Dv].
        slopes: [H] float32.
        cu_seqlens: [N + 1] document bounds.
        backend: as in ``lightning_attention``.

    Returns:
        [N, H, Dk, Dv] float32 (float64 for float64 inputs). Differentiable once in k and v.

    Raises:
        ValueError: as ``lightning_attention``.

    Example:
        >>> k, v = torch.randn(10, 2, 16), torch.randn(10, 2, 16)
        >>> lightning_state(k, v, torch.ones(2), cu_seqlens=[0, 3, 10]).shape
        torch.Size([2, 2, 16, 16])
    """
    check_heads(None, k, v, slopes)
    bounds = check_cu_seqlens(cu_seqlens, k.shape[0])
    if choose_backend(k.device, backend) == "triton":
        from megatron_m1.kernels.lightning.triton_attention import triton_lightning_state

        return triton_lightning_state(k, v, slopes, bounds)
    return torch.stack(
        [_document_state(k[start:end], v[start:end], slopes) for start, end in itertools.pairwise(bounds)]
    )


def _document_state(k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """One matrix product per head."""
    dtype = state_dtype(k.dtype)
    left = torch.arange(k.shape[0] - 1, -1, -1, device=k.device, dtype=dtype)
    weight = torch.exp(-left[:, None] * slopes.to(dtype))  # [n, H]
    weighted = k.to(dtype) * weight[..., None]
    with torch.autocast(k.device.type, enabled=False):
        return torch.einsum("tha,thc->hac", weighted, v.to(dtype))
