"""Lightning attention, the linear attention of MiniMax-M1: causal, without softmax, with a fixed decay per head.

README.md has the math, ``naive.py`` the truth, ``chunk.py`` the form for CPUs, ``triton_walk.py`` the kernels for GPUs.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.checks import check_cu_seqlens, check_heads, check_state
from megatron_m1.kernels.lightning.forms import find_form
from megatron_m1.kernels.lightning.fused import silu_lightning_attention
from megatron_m1.kernels.lightning.naive import state_dtype
from megatron_m1.kernels.lightning.slopes import head_slopes, layer_slopes
from megatron_m1.kernels.lightning.state import lightning_state

__all__ = [
    "choose_backend",
    "head_slopes",
    "layer_slopes",
    "lightning_attention",
    "lightning_attention_step",
    "lightning_state",
    "silu_lightning_attention",
]


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Lightning attention over a pack of documents laid end to end; a document never sees another.

    Within a document, for each head, from its initial state S_0:

        S_t = exp(-slope) S_{t-1} + k_t^T v_t        o_t = q_t S_t        (no scale, no normalisation)

    Args:
        q: queries [T, H, Dk], T the tokens of the pack; float32, bfloat16, float16, or float64 (not with "triton",
            which also ends at Dk, Dv = 256). Any strides: "triton" reads views of one buffer in place, and copies what
            is not dense in its last dimension or has more than 2^25 numbers from token to token. In float16, "triton"
            rounds scores and states to float16 before products, as any form with float16 operands does: they must
            stay below 65504, or results are infinite.
        k: keys [T, H, Dk], q's dtype.
        v: values [T, H, Dv], q's dtype; Dv may differ from Dk.
        slopes: [H] float32 (float64 allowed), finite and >= 0, natural-log decay per token, see ``layer_slopes``.
            Constant: no gradient. Values on a GPU are not checked: looking at them would wait for it.
        cu_seqlens: the N documents' bounds, [N + 1] int32 or int64 (or ints): 0, then each document's end, the last
            being T; strictly rising, any lengths. Best on the CPU: its values are read. Default: one document.
        initial_state: the state before each document's first token, [N, H, Dk, Dv] float32 (float64 for float64
            inputs). Default: zero.
        output_final_state: also return the state after each document's last token.
        backend: "naive" (token by token, for comparison), "chunk" (torch) or "triton" (GPU); default
            ``choose_backend(q.device)``.

    Returns:
        o [T, H, Dv] in v's dtype, contiguous; with ``output_final_state`` the pair (o, final_state), final_state being
        [N, H, Dk, Dv] in initial_state's dtype. States, decays and sums are float32 (float64 for float64 inputs)
        whatever the inputs' dtype. Differentiable in q, k, v and initial_state, through o and final_state, once.

    Raises:
        ValueError: shapes, dtypes, devices, slopes, cu_seqlens or initial_state as above not met, an unknown backend,
            or "triton" without a GPU.

    Example:
        >>> q, k, v = (torch.randn(10, 2, 16) for _ in range(3))
        >>> slopes = layer_slopes(num_heads=2, layer_index=0, num_layers=8)
        >>> o, state = lightning_attention(q, k, v, slopes, cu_seqlens=[0, 3, 10], output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([10, 2, 16]), torch.Size([2, 2, 16, 16]))
    """
    check_heads(q, k, v, slopes)
    bounds = check_cu_seqlens(cu_seqlens, q.shape[0])
    if initial_state is not None:
        check_state(initial_state, "initial_state", q, v, len(bounds) - 1)
    run = find_form(backend, q.device)
    # Autocast would take the float32 products of the states to bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        output, final_state = run(Call(q, k, v, slopes, tuple(bounds), initial_state, output_final_state))
    return output if final_state is None else (output, final_state)


def lightning_attention_step(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Lightning attention over one more token of each of B sequences, as in decoding.

    Args:
        q: queries [B, H, Dk]; float64, float32, bfloat16 or float16.
        k: keys [B, H, Dk], q's dtype.
        v: values [B, H, Dv], q's dtype.
        slopes: [H] float32 (float64 allowed), >= 0, as in ``lightning_attention``; unchecked on a GPU.
        state: the state after each sequence's tokens so far, [B, H, Dk, Dv] float32 (float64 for float64 inputs):
            zeros, or a final_state of ``lightning_attention``. It is not written to.
        backend: "triton" runs one kernel, every other backend torch's operations; default ``choose_backend(q.device)``.

    Returns:
        o [B, H, Dv] in v's dtype, and the new state, shape and dtype as ``state``. Differentiable in all but slopes.

    Raises:
        ValueError: shapes, dtypes, devices or slopes not as above, an unknown backend, or "triton" with float64 or
            without a GPU.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 16) for _ in range(3))
        >>> o, state = lightning_attention_step(q, k, v, head_slopes(2), torch.zeros(1, 2, 16, 16))
        >>> o.shape, state.shape
        (torch.Size([1, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_heads(q, k, v, slopes)
    check_state(state, "state", q, v, q.shape[0], of="B")
    name = choose_backend(q.device, backend)
    if name == "triton":
        from megatron_m1.kernels.lightning.triton_step import triton_step

        return triton_step(q, k, v, slopes, state)
    dtype = state_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        decay = torch.exp(-slopes.to(dtype))[:, None, None]  # [H, 1, 1]
        state = decay * state + k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)
        output = (q.to(dtype).unsqueeze(-2) @ state).squeeze(-2)  # [B, H, Dv]
    return output.to(v.dtype), state
