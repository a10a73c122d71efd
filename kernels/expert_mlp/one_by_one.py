"""Several experts, one after the other: what is fastest on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched, chain

import torch
from torch import Tensor

from megatron_m1.kernels.expert_mlp import expert_mlp
from megatron_m1.kernels.expert_mlp.passes import Kept, Pending, data_pass, forward_pass, keep, weight_gradient


def one_by_one(x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """``expert_mlp`` of every expert's rows.

    Args:
        x: [rows, hidden], sorted by expert.
        scale: [rows].
        counts: rows of each expert.
        weights: fc1, fc2 of every expert in turn.

    Returns:
        [rows, hidden] in ``x``'s dtype, differentiable in x, scale and weights.
    """
    parts = zip(x.split(counts), scale.split(counts), weights[::2], weights[1::2], strict=True)
    return torch.cat([expert_mlp(*part) for part in parts])


class OneByOne:
    """``parallel.expert.layer.Experts`` whose weights are fc1, fc2 of every expert in turn."""

    def forward(
        self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Kept]]:
        """Output [rows, hidden], and what is kept."""
        parts = zip(x.split(counts), scale.split(counts), batched(weights, 2), strict=True)
        outputs, kept = zip(*(forward_pass(tokens, probs, a, b) for tokens, probs, (a, b) in parts), strict=True)
        return torch.cat(outputs), list(kept)

    def keep(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> list[Kept]:
        """What ``forward`` keeps, without its output."""
        parts = zip(x.split(counts), scale.split(counts), weights[::2], strict=True)
        return [keep(tokens, probs, fc1) for tokens, probs, fc1 in parts]

    def backward(
        self, kept: list[Kept], grad: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Pending]]:
        """Gradients of x [rows, hidden] and scale [rows], and what the weights' are made of."""
        parts = zip(kept, grad.split([k.rows for k in kept]), batched(weights, 2), strict=True)
        grads, scales, pending = zip(*(data_pass(k, a, b, part) for k, part, (a, b) in parts), strict=True)
        return torch.cat(grads), torch.cat(scales), list(pending)

    def add_weight_gradients(self, pending: list[Pending], totals: list[Tensor | None], *, more: bool) -> None:
        """Add every expert's."""
        for at, factors in enumerate(chain.from_iterable((one.fc1, one.fc2) for one in pending)):
            if factors is not None:
                found = weight_gradient(factors, totals[at])
                totals[at] = found.float() if more and found.dtype != torch.float64 else found
