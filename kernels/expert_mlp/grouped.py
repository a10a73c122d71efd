"""All experts of a rank in one grouped product each, by torch's ``grouped_mm``: for GPUs without transformer-engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, silu

from megatron_m1.kernels.expert_mlp.passes import Factors

ALIGNMENT = 8
"""Rows that each expert's are rounded up to: 16 bytes of bfloat16, at whose multiples grouped products may begin.

Rows themselves must be so long as well."""


@dataclass(frozen=True)
class _Rows:
    """Where the rows lie once each expert's are rounded up."""

    ends: Tensor
    """[experts] int32: where each expert's rows end."""
    places: Tensor
    """[rows] int64: where each row lies."""
    total: int
    """Rows with those between and after: the products want some after the last end."""
    empty: list[int]
    """Experts without rows, whose gradients the products leave as the memory was."""

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> _Rows:
        sizes = [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]
        ends = list(accumulate(sizes))
        shifts = [
            end - size - before for end, size, before in zip(ends, sizes, accumulate([0, *counts[:-1]]), strict=True)
        ]
        # From pinned memory the process does not wait for the device, where tokens may be on their way still.
        host = torch.tensor([ends, shifts, counts])
        moved = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        places = torch.arange(sum(counts), device=device) + torch.repeat_interleave(
            moved[1], moved[2], output_size=sum(counts)
        )
        empty = [expert for expert, count in enumerate(counts) if count == 0]
        return cls(moved[0].int(), places, ends[-1] + ALIGNMENT, empty)

    def spread(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [total, ...] with zeros between."""
        return x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.places, x)


@dataclass(frozen=True)
class GroupedKept:
    """What the forward pass leaves for the backward one; rows as ``_Rows`` has them."""

    rows: _Rows
    x: Tensor | None
    """[total, hidden]; None where every fc1 is frozen."""
    scale: Tensor
    """[total]"""
    projected: Tensor
    """[total, 2 ffn]"""


@dataclass(frozen=True)
class GroupedPending:
    """What the weights' gradients are products of; None where they need none."""

    rows: _Rows
    fc1: Factors | None
    fc2: Factors | None
    wanted: list[bool]
    """Of every weight, in the weights' order: products are of all experts at once."""


class Grouped:
    """``parallel.expert.layer.Experts`` whose weights are fc1, fc2 of every expert in turn, in 16 bits.

    The products want each layer's weights as one tensor, so that they are copied once a pass.
    """

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether the products take experts with ``weight`` [hidden, ffn]: bfloat16, its rows and columns aligned."""
        return weight.dtype == torch.bfloat16 and not any(size % ALIGNMENT for size in weight.shape)

    def keep(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> GroupedKept:
        """What ``forward`` keeps, without its output."""
        rows = _Rows.of(counts, x.device)
        spread = rows.spread(x)
        fc1 = torch.stack(list(weights[::2]))  # [experts, 2 ffn, hidden]
        kept = spread if any(weight.requires_grad for weight in weights[::2]) else None
        return GroupedKept(rows, kept, rows.spread(scale), grouped_mm(spread, fc1.mT, offs=rows.ends))

    def forward(
        self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]
    ) -> tuple[Tensor, GroupedKept]:
        """Output [rows, hidden], and what is kept."""
        kept = self.keep(x, scale, counts, weights)
        gate, up = kept.projected.chunk(2, dim=-1)
        weighted = (silu(gate).mul_(up) * kept.scale.unsqueeze(-1)).to(x.dtype)  # [total, ffn]
        fc2 = torch.stack(list(weights[1::2]))  # [experts, hidden, ffn]
        return grouped_mm(weighted, fc2.mT, offs=kept.rows.ends).index_select(0, kept.rows.places), kept

    def backward(
        self, kept: GroupedKept, grad: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, GroupedPending]:
        """Gradients of x [rows, hidden] and scale [rows], and what the weights' are made of.

        Weights whose ``requires_grad`` is false get none.
        """
        rows, scale = kept.rows, kept.scale.unsqueeze(-1)
        grad = rows.spread(grad)
        gate, up = kept.projected.chunk(2, dim=-1)
        opened = torch.sigmoid(gate)
        activated = gate * opened  # silu(gate)
        hidden = activated * up
        grad_weighted = grouped_mm(grad, torch.stack(list(weights[1::2])), offs=rows.ends)  # [total, ffn]
        grad_scale = torch.linalg.vecdot(grad_weighted.to(scale.dtype), hidden.to(scale.dtype))
        grad_hidden = (grad_weighted * scale).to(grad.dtype)
        # The derivative of silu is s + a (1 - s), a = gate s.
        slope = torch.lerp(activated, opened.new_ones(()), opened)
        grad_projected = torch.cat([grad_hidden * up * slope, grad_hidden * activated], dim=-1)  # [total, 2 ffn]
        grad_x = grouped_mm(grad_projected, torch.stack(list(weights[::2])), offs=rows.ends)
        wanted = [weight.requires_grad for weight in weights]
        first = (grad_projected, kept.x) if any(wanted[::2]) and kept.x is not None else None
        second = (grad, (hidden * scale).to(grad.dtype)) if any(wanted[1::2]) else None
        pending = GroupedPending(rows, first, second, wanted)
        return grad_x.index_select(0, rows.places), grad_scale.index_select(0, rows.places), pending

    def add_weight_gradients(self, pending: GroupedPending, totals: list[Tensor | None], *, more: bool) -> None:
        """Add every expert's."""
        for place, factors in enumerate((pending.fc1, pending.fc2)):
            if factors is None:
                continue
            a, b = factors
            grads = grouped_mm(a.t(), b, offs=pending.rows.ends)  # [experts, rows of a weight, columns]
            for expert in pending.rows.empty:
                grads[expert].zero_()
            for expert, grad in enumerate(grads.unbind()):
                at = 2 * expert + place
                if not pending.wanted[at]:
                    continue
                known = totals[at]
                if known is not None:
                    known.add_(grad)
                else:
                    totals[at] = grad.float() if more else grad


class _GroupedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        output, kept = Grouped().forward(x, scale, counts, weights)
        rows = kept.rows
        ctx.save_for_backward(rows.ends, rows.places, kept.x, kept.scale, kept.projected, *weights)
        ctx.total, ctx.empty = rows.total, rows.empty
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ends, places, x, scale, projected, *weights = ctx.saved_tensors
        weights = [w if needed else w.detach() for w, needed in zip(weights, ctx.needs_input_grad[3:], strict=True)]
        kept = GroupedKept(_Rows(ends, places, ctx.total, ctx.empty), x, scale, projected)
        grad_x, grad_scale, pending = Grouped().backward(kept, grads[0], weights)
        totals: list[Tensor | None] = [None] * len(weights)
        Grouped().add_weight_gradients(pending, totals, more=False)
        return grad_x, grad_scale, None, *totals


def grouped(x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """``one_by_one.one_by_one``, all experts at once; differentiable once."""
    result: Tensor = _GroupedMlp.apply(x, scale, counts, *weights)
    return result
