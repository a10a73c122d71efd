"""The scaled residual of DeepNorm: alpha x residual + beta x sub-layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def scaled_residual(alpha: float, beta: float) -> Callable[[bool, bool], Add]:
    """Return what megatron-core calls a bias-dropout-add, computing ``alpha * residual + beta * x``.

    M1's linears have no bias and it trains without dropout, so the other arguments of that interface have no effect.
    Source: MiniMax-01 paper, section 2.2 (DeepNorm), and the released modeling file.
    """

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x = x_with_bias[0] if beta == 1.0 else x_with_bias[0] * beta
        return torch.add(x, residual, alpha=alpha)

    def choose(training: bool, fused: bool) -> Add:
        return add

    return choose
