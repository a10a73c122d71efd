"""RMSNorm x sigmoid gate as Triton kernels: one pass over memory each way; the mean square can be shared between ranks.

    i = 1 / sqrt(total / width + eps)     s = sigmoid(a)     y = x i w s     total = sum over the full width of x^2

Where tensor parallelism splits the width, ``total`` is the sum of the ranks' sums, and so is sum(P) in backward, with
P = dy s x w: dx = i dy s w - x i^3 sum(P) / width. Both partial sums come out of a kernel of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.triton_inputs import check_triton, dense_rows
from megatron_m1.kernels.triton_rounding import narrow

FORWARD_WARPS, BACKWARD_WARPS = 8, 16
"""A row of 8192 numbers is 32 or 16 a thread; backward holds five such arrays."""
ROWS_PER_PROGRAM = 64
"""Rows whose weight gradient one program sums: [rows / 64, width] float32 are added up in the end."""


@triton.jit
def load_row(base, row, stride_row, stride_head, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row of ``base`` [T, H, HEAD] with WIDTH = H x HEAD numbers, as float32."""
    at = tl.arange(0, BLOCK)
    pointers = base + row.to(tl.int64) * stride_row + (at // HEAD).to(tl.int64) * stride_head + at % HEAD
    return tl.load(pointers, mask=at < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def forward_row(
    x, weight, gate, y, total, x_t, x_h, gate_t, gate_h, eps, full_width,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """One program a row. Writes ``total`` unless it is SUMMED already, and y if NORMALISE."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = load_row(x, row, x_t, x_h, HEAD, WIDTH, BLOCK)
    if SUMMED:
        square = tl.load(total + row)
    else:
        square = tl.sum(values * values)
        tl.store(total + row, square)
    if NORMALISE:
        scale = 1.0 / tl.sqrt(square / full_width + eps)
        opened = tl.sigmoid(load_row(gate, row, gate_t, gate_h, HEAD, WIDTH, BLOCK))
        factor = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        result = narrow(values * scale * factor * opened, y.dtype.element_ty)
        tl.store(y + row.to(tl.int64) * WIDTH + at, result, mask=at < WIDTH)


@triton.jit
def backward_rows(
    grad, x, weight, gate, total, projection, grad_x, grad_gate, grad_weight,
    rows, grad_t, grad_h, x_t, x_h, gate_t, gate_h, dgate_t, dgate_h, eps, full_width,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PROJECTED: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows. Writes ``projection`` = sum(P) unless it is PROJECTED, and gradients if DIFFERENTIATE."""
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < WIDTH
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, tl.minimum(ROWS, rows - program * ROWS)):
        row = program * ROWS + i
        values = load_row(x, row, x_t, x_h, HEAD, WIDTH, BLOCK)
        opened = tl.sigmoid(load_row(gate, row, gate_t, gate_h, HEAD, WIDTH, BLOCK))
        flow = load_row(grad, row, grad_t, grad_h, HEAD, WIDTH, BLOCK) * opened
        product = flow * values
        if PROJECTED:
            project = tl.load(projection + row)
        else:
            project = tl.sum(product * factor)
            tl.store(projection + row, project)
        if DIFFERENTIATE:
            scale = 1.0 / tl.sqrt(tl.load(total + row) / full_width + eps)
            # Read once more, out of the L1 cache: kept over the sum, the row makes the kernel spill.
            values = load_row(x, row, x_t, x_h, HEAD, WIDTH, BLOCK)
            product = flow * values
            sum_weight += product * scale
            dx = flow * factor * scale - values * (scale * scale * scale * project / full_width)
            tl.store(grad_x + row.to(tl.int64) * WIDTH + at, narrow(dx, grad_x.dtype.element_ty), mask=inside)
            dgate = narrow(product * factor * scale * (1.0 - opened), grad_gate.dtype.element_ty)
            where = row.to(tl.int64) * dgate_t + (at // HEAD) * dgate_h + at % HEAD
            tl.store(grad_gate + where, dgate, mask=inside)
    if DIFFERENTIATE:
        tl.store(grad_weight + program.to(tl.int64) * WIDTH + at, sum_weight, mask=inside)


def _launch_forward(
    x: Tensor, weight: Tensor, gate: Tensor, total: Tensor, y: Tensor | None, width: int, eps: float, summed: bool
) -> None:
    tokens, heads, head = x.shape
    forward_row[(tokens,)](
        x, weight, gate, x if y is None else y, total, *x.stride()[:2], *gate.stride()[:2], eps, width,
        HEAD=head, WIDTH=heads * head, BLOCK=triton.next_power_of_2(heads * head),
        SUMMED=summed, NORMALISE=y is not None, num_warps=FORWARD_WARPS,
    )  # fmt: skip


class _GatedNorm(torch.autograd.Function):
    """Keeps its inputs and a number a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor,
        eps: float,
        width: int,
        add_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """[T, H, D]."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            if add_over_ranks is not None:
                _launch_forward(x, weight, gate, total, None, width, eps, summed=False)
                total = add_over_ranks(total)
            _launch_forward(x, weight, gate, total, y, width, eps, summed=add_over_ranks is not None)
        ctx.save_for_backward(x, weight, gate, total)
        ctx.eps, ctx.width, ctx.add_over_ranks = eps, width, add_over_ranks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and gate."""
        x, weight, gate, total = ctx.saved_tensors
        grad = dense_rows(grads[0])
        tokens, heads, head = x.shape
        programs = triton.cdiv(tokens, ROWS_PER_PROGRAM)
        dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
        sums = torch.empty(programs, heads * head, dtype=torch.float32, device=x.device)
        projection = torch.empty_like(total)

        def launch(projected: bool, differentiate: bool) -> None:
            backward_rows[(programs,)](
                grad, x, weight, gate, total, projection, dx, dgate, sums, tokens,
                *grad.stride()[:2], *x.stride()[:2], *gate.stride()[:2], *dgate.stride()[:2], ctx.eps, ctx.width,
                HEAD=head, WIDTH=heads * head, BLOCK=triton.next_power_of_2(heads * head), ROWS=ROWS_PER_PROGRAM,
                PROJECTED=projected, DIFFERENTIATE=differentiate, num_warps=BACKWARD_WARPS,
            )  # fmt: skip

        with torch.cuda.device_of(x):
            if ctx.add_over_ranks is not None:
                launch(projected=False, differentiate=False)
                projection = ctx.add_over_ranks(projection)
            launch(projected=ctx.add_over_ranks is not None, differentiate=True)
        return dx, sums.sum(0).to(weight.dtype), dgate, None, None, None


def triton_gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    eps: float,
    width: int,
    add_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Run the kernels; arguments and result as in ``gated_rms_norm``, already checked.

    Raises:
        ValueError: see ``check_triton``.
    """
    check_triton(x)
    result: Tensor = _GatedNorm.apply(dense_rows(x), weight.contiguous(), dense_rows(gate), eps, width, add_over_ranks)
    return result
