"""Lightning attention over one more token of each sequence, as a Triton kernel: reads and writes each state once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.triton_inputs import check_triton, dense_rows
from megatron_m1.kernels.triton_rounding import narrow

COLUMNS = 32
"""Columns of a state that a program holds; with 4 warps a state of 128 rows takes 32 registers a thread."""


@triton.jit
def step(
    q, k, v, o, slopes, state, new_state,
    heads, q_b, q_h, k_b, k_h, v_b, v_h,
    A: tl.constexpr, C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of one head's state in one sequence. Grid: (sequences x heads, C / BLOCK_C).

    Sequences are in the first dimension, which takes 2^31 - 1; the others end at 65535.
    """
    head, sequence = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    a, c = tl.arange(0, BLOCK_A), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    q_row = tl.load(q + sequence * q_b + head * q_h + a, mask=a < A, other=0.0).to(tl.float32)
    k_row = tl.load(k + sequence * k_b + head * k_h + a, mask=a < A, other=0.0).to(tl.float32)
    v_row = tl.load(v + sequence * v_b + head * v_h + c, mask=c < C, other=0.0).to(tl.float32)
    at = (sequence * heads + head) * (A * C) + a[:, None] * C + c[None, :]
    mask = (a < A)[:, None] & (c < C)[None, :]
    old = tl.load(state + at, mask=mask, other=0.0)
    new = old * tl.exp(-tl.load(slopes + head).to(tl.float32)) + k_row[:, None] * v_row[None, :]
    tl.store(new_state + at, new, mask=mask)
    result = tl.sum(q_row[:, None] * new, axis=0)
    tl.store(o + (sequence * heads + head) * C + c, narrow(result, o.dtype.element_ty), mask=c < C)


class _Step(torch.autograd.Function):
    """The kernel forward; decoding is seldom differentiated, so backward is the formulas in torch."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, H, Dv] and new state [B, H, Dk, Dv]."""
        sequences, heads, width_a = q.shape
        width_c = v.shape[2]
        output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        new_state = torch.empty_like(state)
        block_c = min(COLUMNS, triton.next_power_of_2(width_c))
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        with torch.cuda.device_of(q):
            step[(sequences * heads, triton.cdiv(width_c, block_c))](
                q, k, v, output, slopes, state, new_state, heads, *strides,
                A=width_a, C=width_c, BLOCK_A=triton.next_power_of_2(width_a), BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, slopes, new_state)
        return output, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the state."""
        q, k, v, slopes, new_state = ctx.saved_tensors
        grad_output, grad_state = grads[0].float(), grads[1]
        total = grad_state + q.float().unsqueeze(-1) * grad_output.unsqueeze(-2)  # [B, H, Dk, Dv]
        with torch.autocast(q.device.type, enabled=False):
            dq = torch.einsum("bhc,bhac->bha", grad_output, new_state)
            dk = torch.einsum("bhac,bhc->bha", total, v.float())
            dv = torch.einsum("bhac,bha->bhc", total, k.float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, total * torch.exp(-slopes)[:, None, None]


def triton_step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as in ``lightning_attention_step``, already checked.

    Raises:
        ValueError: see ``check_triton``.
    """
    check_triton(q)
    result: tuple[Tensor, Tensor] = _Step.apply(
        dense_rows(q), dense_rows(k), dense_rows(v), slopes.float().contiguous(), state.contiguous()
    )
    return result
