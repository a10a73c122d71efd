"""The residual schemes of ``shapes.residual`` in megatron-core's layer: which tensor is added, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_m1.config import ModelConfig
from megatron_m1.layers.norm import NormBuilder
from megatron_m1.shapes.residual import RESIDUALS, residual_alpha

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def block_norm(model: ModelConfig, build: NormBuilder) -> NormBuilder:
    """Return the builder of the norms before a layer's sub-layers, from that of a plain norm."""
    return _residual_norm(build) if RESIDUALS[model.residual].is_normalised else build


def _output_and_residual(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[Tensor, Tensor]:
    return output, output


def _residual_norm(build: NormBuilder) -> NormBuilder:
    """Make the builder of a norm return one that answers ``(y, y)``: M1's residual is the normalised tensor.

    megatron-core's ``TransformerLayer`` takes the second entry as the residual, and the norm's input where there is
    none. A forward hook keeps the norm's class and parameter names as they are, whichever implementation builds it.
    """

    def built(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **named: Any) -> nn.Module:
        norm = build(config=config, hidden_size=hidden_size, eps=eps, **named)
        norm.register_forward_hook(_output_and_residual)
        return norm

    return built


def scaled_residual(model: ModelConfig) -> Callable[[bool, bool], Add]:
    """Return what megatron-core calls a bias-dropout-add, computing ``alpha * residual + beta * x``.

    M1's linears have no bias and it trains without dropout, so the other arguments of that interface have no effect.
    Source: MiniMax-01 paper, section 2.2 (DeepNorm), and the released modeling file.
    """
    alpha, beta = residual_alpha(model), model.residual_beta

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x = x_with_bias[0] if beta == 1.0 else x_with_bias[0] * beta
        return torch.add(x, residual, alpha=alpha)

    def choose(training: bool, fused: bool) -> Add:
        return add

    return choose
