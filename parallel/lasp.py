"""LASP+: lightning attention over documents that cross ranks, with one all-gather of states each way.

Segment j of C tokens leaves its tail's own state L_j and passes on what entered it, decayed over C tokens, where one
document goes through. The state that enters segment s is the scan of those before it; its head's queries add

    o_t += lambda^t q_t S_s            t = 1 .. tokens of the head

Backward, heads leave G_s = sum_t lambda^t q_t^T do_t, the gradient D_j of the state that leaves segment j is the scan
of those after it, and tails add ``dk_t += lambda^(n-t) v_t D^T`` and ``dv_t += lambda^(n-t) k_t D``. Both scans are
``scan.scan``. MiniMax-01 paper (arXiv 2501.08313), section 3.2.2, which gives neither the decay nor the backward pass.

States are float32 (float64 for float64 inputs), also on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_m1.kernels.lightning import lightning_attention, lightning_state
from megatron_m1.parallel.crossings import Rows
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.scan import Decay, scan
from megatron_m1.parallel.state_plan import StateExchange, StatePlan

ROWS_AT_ONCE = 4096
"""Tokens of a piece that are multiplied with a state at once: bounds the float32 copies of them."""


@dataclass(frozen=True)
class _Call:
    """What stays the same over forward and backward of one call."""

    plan: StatePlan
    bounds: tuple[int, ...]
    group: dist.ProcessGroup
    backend: str | None


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Gather:
    """One asynchronous all-gather of the states that ranks send."""

    def __init__(self, own: Tensor | None, exchange: StateExchange, shape: tuple[int, ...], like: Tensor, call: _Call):
        """Start it: ``own`` [n, H, Dk, Dv], n <= slots, or None for none; ``shape`` is [H, Dk, Dv]."""
        with record_function("lasp: start gather"):
            if own is not None and own.shape[0] == exchange.slots:
                self.sent = own.contiguous()
            else:
                self.sent = torch.zeros(exchange.slots, *shape, dtype=_state_dtype(like), device=like.device)
                if own is not None:
                    self.sent[: own.shape[0]] = own
            rows = exchange.slots * call.group.size()
            self.received = torch.empty(rows, *shape, dtype=self.sent.dtype, device=like.device)
            self.work: Any = dist.all_gather_into_tensor(self.received, self.sent, group=call.group, async_op=True)

    def wait(self) -> Tensor:
        """The states of all ranks, [ranks x slots, H, Dk, Dv]."""
        with record_function("lasp: wait for gather"):
            self.work.wait()
        return self.received


def _in_parts(rows: Rows) -> list[Rows]:
    start, end = rows
    return [(at, min(at + ROWS_AT_ONCE, end)) for at in range(start, end, ROWS_AT_ONCE)]


def _add_products(out: Tensor, rows: Rows, x: Tensor, state: Tensor, slopes: Tensor, *, from_end: bool) -> None:
    """``out[t] += w_t x[t] @ state`` for the tokens t of a piece; state [H, A, B].

    ``w`` is lambda^1, lambda^2, ... from the piece's start, or lambda^0, lambda^1, ... from its end backwards.
    """
    start, end = rows
    # Autocast would take the products with a state to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        for first, last in _in_parts(rows):
            place = torch.arange(first, last, device=x.device, dtype=state.dtype)
            steps = (end - 1) - place if from_end else place - (start - 1)
            weights = torch.exp(-slopes.to(state.dtype)[:, None] * steps)  # [H, n]
            heads = x[first:last].transpose(0, 1).to(state.dtype) * weights[..., None]  # [n, H, A] -> [H, n, A]
            out[first:last] += (heads @ state).transpose(0, 1).to(out.dtype)  # [H, n, B] -> [n, H, B]


def _pieces(x: Tensor, pieces: tuple[Rows, ...], *, backwards: bool = False) -> Tensor:
    """The pieces' tokens end to end, each piece from its last token to its first if ``backwards``."""
    parts = [x[start:end].flip(0) if backwards else x[start:end] for start, end in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _own_states(a: Tensor, b: Tensor, pieces: tuple[Rows, ...], slopes: Tensor, call: _Call, *, backwards: bool) -> Any:
    """sum_t lambda^(tokens of the piece after t) a_t^T b_t of each piece, tokens before t if ``backwards``; or None."""
    if not pieces:
        return None
    bounds = [0]
    for start, end in pieces:
        bounds.append(bounds[-1] + end - start)
    a, b = _pieces(a, pieces, backwards=backwards), _pieces(b, pieces, backwards=backwards)
    return lightning_state(a, b, slopes, cu_seqlens=bounds, backend=call.backend)


class _Lasp(torch.autograd.Function):
    """Keeps its inputs, the states that entered, and the local call's graph, which keeps the same inputs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, entered: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        exchange, shape = call.plan.forward, (q.shape[1], q.shape[2], v.shape[2])
        gather = None
        if entered is None:
            own = _own_states(k, v, exchange.sends, slopes, call, backwards=False)
            gather = _Gather(own, exchange, shape, q, call)
        q, k, v = inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad(), record_function("lasp: local attention"):
            local = lightning_attention(q, k, v, slopes, cu_seqlens=call.bounds, backend=call.backend)
        if gather is not None:
            entered = scan(exchange.chains, gather.wait(), Decay(slopes), len(exchange.receives))
        assert entered is not None
        output = local.detach()
        for state, rows in zip(entered, exchange.receives, strict=True):
            _add_products(output, rows, q.detach(), state, slopes, from_end=False)
        ctx.save_for_backward(slopes, entered)
        ctx.call, ctx.inputs, ctx.local = call, inputs, local
        ctx.mark_non_differentiable(entered)
        return output, entered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes, entered), call, (q, k, v) = ctx.saved_tensors, ctx.call, ctx.inputs
        exchange, grad = call.plan.backward, grads[0]
        own = _own_states(q, grad, exchange.sends, slopes, call, backwards=True)
        if own is not None:
            # These sums leave the first token undecayed, as the forward ones do the last; but the state in front of a
            # document has decayed once by the time it meets that token.
            own = own * torch.exp(-slopes.to(own.dtype))[:, None, None]
        gather = _Gather(own, exchange, tuple(entered.shape[1:]), q, call)
        with record_function("lasp: local attention backward"):
            dq, dk, dv = torch.autograd.grad(ctx.local, (q, k, v), grad)
        ctx.local = ctx.inputs = None
        q, k, v = q.detach(), k.detach(), v.detach()
        for state, rows in zip(entered, call.plan.forward.receives, strict=True):
            _add_products(dq, rows, grad, state.mT, slopes, from_end=False)
        left = scan(exchange.chains, gather.wait(), Decay(slopes), len(exchange.receives))
        for state, rows in zip(left, exchange.receives, strict=True):
            _add_products(dk, rows, v, state.mT, slopes, from_end=True)
            _add_products(dv, rows, k, state, slopes, from_end=True)
        return dq, dk, dv, None, None, None


def lasp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
    *,
    entered: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``lightning_attention`` of a pack whose tokens are spread over ranks as ``layout`` says.

    One asynchronous all-gather forward and one backward, whatever the number of ranks; each starts before the rank's
    own attention kernel and is waited for after it. A document that crosses no segment's bound costs nothing, and where
    none does, no rank communicates.

    Args:
        q: this rank's queries [n, H, Dk]; float64, float32, bfloat16 or float16.
        k: keys [n, H, Dk], q's dtype.
        v: values [n, H, Dv], q's dtype.
        slopes: [H] float32, natural-log decay per token, the same on every rank.
        layout: of the pack, ``n`` being its ``local_tokens``.
        group: the ranks that share the pack, in the layout's order; None if it is one.
        entered: what an earlier call with the same inputs returned, by which a recomputed forward pass needs no
            communication.
        backend: as in ``lightning_attention``.

    Returns:
        o [n, H, Dv] in v's dtype, differentiable once in q, k and v; and the states that entered this rank's segments
        [M, H, Dk, Dv] float32 (float64 for float64 inputs), or None if there is no communication at all.

    Raises:
        ValueError: as ``lightning_attention``; the group is not of the layout's size.
    """
    size = 1 if group is None else group.size()
    if size != layout.context_parallel_size:
        raise ValueError(f"the group has {size} ranks, the layout {layout.context_parallel_size}: give the same")
    bounds, plan = layout.local_document_bounds, layout.state_plan
    if group is None or plan.is_empty:
        return lightning_attention(q, k, v, slopes, cu_seqlens=bounds, backend=backend), None
    call = _Call(plan, bounds, group, backend)
    result: tuple[Tensor, Tensor] = _Lasp.apply(q, k, v, slopes, entered, call)
    return result
