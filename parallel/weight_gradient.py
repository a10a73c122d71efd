"""Weights' gradients that are added where megatron-core's DDP sums them up, instead of going there through autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def main_gradient(weight: Tensor) -> Tensor | None:
    """DDP's fp32 sum of the weight's gradients over micro-batches, to be added to in place; None without DDP."""
    found: Tensor | None = getattr(weight, "main_grad", None)
    return found


def mark_added(weights: Sequence[Tensor]) -> list[Tensor]:
    """Tell DDP that the gradients are in its sums already; return what autograd gets in their place.

    DDP wants that there is something, and does not read it: those of one shape share their memory.
    """
    blanks: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
    found = []
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        key = weight.shape, weight.dtype
        if key not in blanks:
            blanks[key] = torch.empty_like(weight)
        found.append(blanks[key].view(weight.shape))
    return found
