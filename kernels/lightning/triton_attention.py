"""Lightning attention by the Triton kernels of ``triton_walk.py``: which walks make the output and the gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.triton_launch import Documents
from megatron_m1.kernels.lightning.triton_tune import tuned_walk
from megatron_m1.kernels.triton_inputs import check_triton

MAX_WIDTH = 256
MAX_STRIDE = 2**25
"""Numbers from token to token: 64 tokens of a chunk reach 2^31, where its 32-bit offsets end."""


def _rows(x: Tensor) -> Tensor:
    """``x`` [T, ...] itself if the walk can read its rows where they are."""
    return x if x.stride(-1) == 1 and x.stride(0) <= MAX_STRIDE else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the final states if they are kept."""
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = None
    if documents.keeps_final:
        final_state = torch.empty(documents.count, *k.shape[1:], v.shape[2], dtype=torch.float32, device=v.device)
    walk_o = tuned_walk(q, k, v, slopes, silu=(silu, silu, silu))
    plan = documents.plan(walk_o)
    carries = walk_o.carries(plan, initial_state)
    walk_o.launch(plan.segments, output, initial_state, carries, final_state)
    return output, final_state


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
    silu: bool,
    grad_output: Tensor,
    grad_final: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Write the gradients of q, k, v to ``outputs``; return that of the initial states."""
    (q, k, v), (dq, dk, dv) = inputs, outputs
    walk_q = tuned_walk(grad_output, v, k, slopes, transposed=True, silu=(False, silu, silu))
    plan = documents.plan(walk_q)
    carries = walk_q.carries(plan, initial_state)
    walk_q.launch(plan.segments, dq, initial_state, carries, None, raw=q if silu else None)

    grad_initial = None
    if initial_state is not None:
        grad_initial = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    walk_v = tuned_walk(k, q, grad_output, slopes, reverse=True, silu=(silu, silu, False))
    plan = documents.plan(walk_v)
    carries = walk_v.carries(plan, grad_final)
    walk_v.launch(plan.segments, dv, grad_final, carries, grad_initial, raw=v if silu else None)
    # The same states, seen transposed: dk takes dv's segments and what enters them.
    walk_k = tuned_walk(v, grad_output, q, slopes, reverse=True, transposed=True, silu=(silu, False, silu))
    walk_k.launch(plan.segments, dk, grad_final, carries, None, raw=k if silu else None)
    return grad_initial


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Memory for dq, dk, dv: one buffer [T, H, 2 Dk + Dv] if q, k, v lie next to each other in one, as views of it."""
    widths = [x.shape[2] for x in (q, k, v)]
    after = (k.storage_offset() - q.storage_offset(), v.storage_offset() - k.storage_offset())
    same = len({(x.untyped_storage().data_ptr(), *x.stride()) for x in (q, k, v)}) == 1
    if same and after == (widths[0], widths[1]):
        buffer = torch.empty(*q.shape[:2], sum(widths), dtype=q.dtype, device=q.device)
        return buffer.split(widths, dim=2)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]


class _Attention(torch.autograd.Function):
    """Keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, documents: Documents
    ) -> tuple[Tensor, Tensor | None]:
        """Output [T, H, Dv] and final states."""
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.documents = documents
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(q):
            return _forward(q, k, v, slopes, initial_state, documents, silu=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the initial states."""
        q, k, v, slopes, initial_state = ctx.saved_tensors
        grad_output = torch.zeros_like(v) if grads[0] is None else _rows(grads[0])
        grad_final = None if grads[1] is None else grads[1].contiguous()
        dq, dk, dv = _gradients(q, k, v)
        with torch.cuda.device_of(q):
            grad_initial = _backward(
                (q, k, v), slopes, initial_state, ctx.documents, False, grad_output, grad_final, (dq, dk, dv)
            )
        return dq, dk, dv, None, grad_initial, None


class _SiluAttention(torch.autograd.Function):
    """Attention of SiLU(q), SiLU(k), SiLU(v), which with what rides along are one tensor; so are their gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, slopes: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """[T, H, P, D] -> the output [T, H, D], and the parts after q, k, v as a view [T, H, P - 3, D]."""
        ctx.save_for_backward(parts, slopes)
        ctx.documents = documents
        q, k, v = parts[:, :, :3].unbind(2)
        with torch.cuda.device_of(parts):
            output, _ = _forward(q, k, v, slopes, None, documents, silu=True)
        return output, parts[:, :, 3:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``parts``."""
        parts, slopes = ctx.saved_tensors
        grad = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        grad[:, :, 3:] = grads[1]
        q, k, v = parts[:, :, :3].unbind(2)
        dq, dk, dv = grad[:, :, :3].unbind(2)
        with torch.cuda.device_of(parts):
            _backward((q, k, v), slopes, None, ctx.documents, True, _rows(grads[0]), None, (dq, dk, dv))
        return grad, None, None


def _check(x: Tensor, *widths: int) -> None:
    """Check that the kernels take ``x``'s dtype and device, and head dims ``widths``."""
    check_triton(x)
    if max(widths) > MAX_WIDTH:
        raise ValueError(f"head dims {widths}: the triton backend takes at most {MAX_WIDTH}, backend='chunk' any")


def triton_lightning_attention(call: Call, *, segment_tokens: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Run the kernels.

    Args:
        call: the arguments.
        segment_tokens: the most tokens that one program walks; default by the GPU, see ``walk_plan.segment_tokens``.

    Returns:
        The output [T, H, Dv] in v's dtype; the final states in float32, or None.

    Raises:
        ValueError: see ``check_triton``; head dims above 256.
    """
    _check(call.q, call.q.shape[2], call.v.shape[2])
    state = call.initial_state
    documents = Documents(call.cu_seqlens, state is not None, call.output_final_state, segment_tokens)
    result: tuple[Tensor, Tensor | None] = _Attention.apply(
        _rows(call.q),
        _rows(call.k),
        _rows(call.v),
        call.slopes.float().contiguous(),
        None if state is None else state.contiguous(),
        documents,
    )
    return result


def triton_silu_attention(
    parts: Tensor, slopes: Tensor, cu_seqlens: Sequence[int], *, segment_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of SiLU(q), SiLU(k), SiLU(v) out of ``parts`` [T, H, P, D]; see ``fused.silu_lightning_attention``."""
    _check(parts, parts.shape[3])
    documents = Documents(tuple(cu_seqlens), segment_tokens=segment_tokens)
    result: tuple[Tensor, Tensor] = _SiluAttention.apply(_rows(parts), slopes.float().contiguous(), documents)
    return result


class _State(torch.autograd.Function):
    """The states that tokens alone leave."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents) -> Tensor:
        """[N, H, Dk, Dv]."""
        ctx.save_for_backward(k, v, slopes)
        ctx.documents = documents
        states = torch.empty(documents.count, *k.shape[1:], v.shape[2], dtype=torch.float32, device=k.device)
        with torch.cuda.device_of(k):
            walk_s = tuned_walk(k, k, v, slopes)
            plan = documents.plan(walk_s)
            carries = walk_s.carries(plan, None)
            walk_s.launch(plan.segments, None, None, carries, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of k and v."""
        k, v, slopes = ctx.saved_tensors
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        grad = grads[0].contiguous()
        with torch.cuda.device_of(k):
            walk_v = tuned_walk(k, k, v, slopes, reverse=True)
            walk_k = tuned_walk(v, v, k, slopes, reverse=True, transposed=True)
            plan = ctx.documents.plan(walk_v)
            carries = walk_v.carries(plan, grad, keys=False)
            walk_v.launch(plan.segments, dv, grad, carries, None, keys=False)
            walk_k.launch(plan.segments, dk, grad, carries, None, keys=False)
        return dk, dv, None, None


def triton_lightning_state(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Sequence[int],
    *,
    segment_tokens: int | None = None,
) -> Tensor:
    """Run the kernels; arguments and result as in ``state.lightning_state``, already checked."""
    _check(k, k.shape[2], v.shape[2])
    documents = Documents(tuple(cu_seqlens), keeps_final=True, segment_tokens=segment_tokens)
    result: Tensor = _State.apply(_rows(k), _rows(v), slopes.float().contiguous(), documents)
    return result
