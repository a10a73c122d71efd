"""Varlen ring attention: causal softmax attention inside documents that cross ranks.

At the step of distance s a rank receives, straight from the rank s behind it, the keys and values that its queries can
attend to and no others, and the rank s ahead gets its own. The next block travels while the current one is computed.
The parts are merged by their LSE: with ``l = log(exp(l1) + exp(l2))``,

    o = exp(l1 - l) o1 + exp(l2 - l) o2

Backward, the blocks travel again, and the gradients of their keys and values return to their owners. Sums over parts
are float32 (float64 for float64 inputs). MiniMax-01 paper (arXiv 2501.08313), section 3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_m1.parallel.block_attention import Block, attend, attend_backward
from megatron_m1.parallel.crossings import Rows
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_plan import Rectangle, RingPlan, Step


def _at(x: Tensor, rows: Rows) -> Tensor:
    return x[rows[0] : rows[1]]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Message:
    """Tokens on their way to one rank, and others on their way from another."""

    def __init__(self, group: dist.ProcessGroup, tag: int, send: Tensor, to: int, receive: Tensor, source: int) -> None:
        """Start both directions that are not empty; ranks count within ``group``, round its end."""
        self.received = receive
        self.sent = send.contiguous()
        operations = []
        for operate, tokens, peer in ((dist.isend, self.sent, to), (dist.irecv, receive, source)):
            if len(tokens):
                rank = dist.get_global_rank(group, peer % group.size())
                operations.append(dist.P2POp(operate, tokens, rank, group, tag))
        self.work: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """The tokens that came."""
        for work in self.work:
            work.wait()
        return self.received


class _Blocks:
    """The keys and values of other ranks, step by step; one block travels while another is read."""

    def __init__(self, kv: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        """Start the first step's exchange; ``kv`` [n, 2, groups, dim] is this rank's own."""
        self.kv, self.plan, self.group = kv, plan, group
        sizes = [step.receives for step in plan.steps]
        self.buffers = [
            torch.empty(max(sizes[i::2], default=0), *kv.shape[1:], dtype=kv.dtype, device=kv.device) for i in range(2)
        ]
        self.message = self._start(0)

    def _start(self, index: int) -> _Message | None:
        if index >= len(self.plan.steps):
            return None
        step, rank = self.plan.steps[index], self.group.rank()
        with record_function("ring: start exchange"):
            parts = [_at(self.kv, rows) for rows in step.sends]
            send = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self.kv[:0]
            receive = self.buffers[index % 2][: step.receives]
            # Keys and values have even tags and their gradients odd ones: both may be on their way at once.
            return _Message(self.group, 2 * step.distance, send, rank + step.distance, receive, rank - step.distance)

    def take(self, index: int) -> Tensor:
        """The block [m, 2, groups, dim] of step ``index``; the next one's exchange is started."""
        assert self.message is not None
        with record_function("ring: wait for exchange"):
            block = self.message.wait()
        self.message = self._start(index + 1)
        return block


def _block_of(rectangle: Rectangle) -> Block:
    (q_start, q_end), (k_start, k_end) = rectangle.queries, rectangle.keys
    return Block((0, q_end - q_start), (0, k_end - k_start), causal=False)


class _Merged:
    """The output and LSE of the parts so far."""

    def __init__(self, output: Tensor, lse: Tensor) -> None:
        self.output = output.to(_sum_dtype(output))  # [n, heads, dim]
        self.lse = lse  # [heads, n]

    def add(self, rows: Rows, output: Tensor, lse: Tensor) -> None:
        """Merge a part's output [m, heads, dim] and LSE [heads, m] into ``rows``."""
        before = self.lse[:, rows[0] : rows[1]]
        after = torch.logaddexp(before, lse)
        # [heads, m] -> [m, heads, 1]
        old, new = ((part - after).exp().t().unsqueeze(-1) for part in (before, lse))
        _at(self.output, rows).mul_(old).add_(output * new)
        before.copy_(after)


@dataclass(frozen=True)
class _Call:
    """What stays the same over forward and backward of one call."""

    plan: RingPlan
    group: dist.ProcessGroup

    @property
    def local(self) -> Block:
        """The rank's own tokens with each other."""
        return Block(self.plan.local_bounds, self.plan.local_bounds, causal=True)


class _Gradients:
    """Sums of the gradients of this rank's queries, keys and values, and of what comes back from other ranks."""

    def __init__(self, dq: Tensor, dk: Tensor, dv: Tensor, group: dist.ProcessGroup) -> None:
        self.dq = dq.to(_sum_dtype(dq))
        self.dkv = torch.stack((dk, dv), dim=1).to(_sum_dtype(dk))  # [n, 2, groups, dim]
        self.group = group
        self.returning: tuple[Step, _Message] | None = None

    def send_back(self, step: Step, block: Tensor) -> None:
        """Start the return of a block's gradients [m, 2, groups, dim] to its owner, after that of the block before."""
        self.settle()
        rank = self.group.rank()
        with record_function("ring: start return"):
            receive = torch.empty(step.sent, *block.shape[1:], dtype=block.dtype, device=block.device)
            tag = 2 * step.distance + 1
            self.returning = (
                step,
                _Message(self.group, tag, block, rank - step.distance, receive, rank + step.distance),
            )

    def settle(self) -> None:
        """Add what has come back."""
        if self.returning is None:
            return
        step, message = self.returning
        with record_function("ring: wait for return"):
            came = message.wait()
        at = 0
        for start, end in step.sends:
            self.dkv[start:end] += came[at : at + end - start]
            at += end - start
        self.returning = None


class _Ring(torch.autograd.Function):
    """Keeps its inputs, the merged output and LSE."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        blocks = _Blocks(torch.stack((k, v), dim=1), call.plan, call.group)  # [n, 2, groups, dim]
        with record_function("ring: local attention"):
            merged = _Merged(*attend(q, k, v, call.local))
        for index, step in enumerate(call.plan.steps):
            block = blocks.take(index)
            with record_function("ring: block attention"):
                for rectangle in step.rectangles:
                    keys, values = _at(block, rectangle.keys).unbind(1)
                    part = attend(_at(q, rectangle.queries), keys, values, _block_of(rectangle))
                    merged.add(rectangle.queries, *part)
        output = merged.output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, merged.lse)
        ctx.call = call
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        call, grad = ctx.call, grads[0]
        blocks = _Blocks(torch.stack((k, v), dim=1), call.plan, call.group)
        with record_function("ring: local attention backward"):
            sums = _Gradients(*attend_backward(grad, q, k, v, output, lse, call.local), call.group)
        for index, step in enumerate(call.plan.steps):
            block = blocks.take(index)
            with record_function("ring: block attention backward"):
                dkv = torch.zeros(block.shape, dtype=sums.dkv.dtype, device=block.device)
                for rectangle in step.rectangles:
                    rows, (keys, values) = rectangle.queries, _at(block, rectangle.keys).unbind(1)
                    queries, whole, lse_part = _at(q, rows), _at(output, rows), lse[:, rows[0] : rows[1]]
                    dq, *parts = attend_backward(
                        _at(grad, rows), queries, keys, values, whole, lse_part, _block_of(rectangle)
                    )
                    _at(sums.dq, rows).add_(dq)
                    _at(dkv, rectangle.keys).add_(torch.stack(parts, dim=1))
            sums.send_back(step, dkv)
        sums.settle()
        dk, dv = sums.dkv.to(k.dtype).unbind(1)
        return sums.dq.to(q.dtype), dk, dv, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, group: dist.ProcessGroup) -> Tensor:
    """Causal softmax attention of every document with itself, over a pack that is spread over ranks.

    Args:
        q: this rank's queries [n, heads, dim], rotated by their positions; dense in the last dimension.
        k: keys [n, groups, dim], q's dtype; ``groups`` divides ``heads``.
        v: values [n, groups, dim].
        layout: of the pack, ``n`` being its ``local_tokens``.
        group: the ranks that share the pack, in the layout's order.

    Returns:
        [n, heads, dim] in q's dtype, scaled by 1/sqrt(dim) inside the softmax; differentiable once.

    Raises:
        ValueError: the group is not of the layout's size, or there are not ``local_tokens`` queries.
    """
    if q.shape[0] != layout.local_tokens:
        raise ValueError(f"q has {q.shape[0]} tokens, the layout's rank {layout.local_tokens}: give the rank's own")
    if group.size() != layout.context_parallel_size:
        raise ValueError(
            f"the group has {group.size()} ranks, the layout {layout.context_parallel_size}: give the same"
        )
    output: Tensor = _Ring.apply(q, k, v, _Call(layout.ring_plan, group))
    return output
