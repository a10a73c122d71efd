"""The residual schemes: what a sub-layer's output is added to, with which factor, and how large weights begin.

``deepnorm`` is M1's: the residual is the *normalised* tensor times alpha = (2N)^(1/4), and the matrices through which
values pass begin with a gain of (8N)^(-1/4). Source: MiniMax-01 paper, sections 2.2 and 4.2; DeepNet (arXiv
2203.00555), which puts the gain on the value and output projections and on the FFN, and 1 on queries and keys.

``prenorm`` is plain: the residual is the norm's input. Its gain of (2N)^(-1/2) on output projections, which keeps the
sum of 2N sub-layers as large as one, is our choice (GPT-2's); no released model of this family has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_m1.config.tree import ModelConfig


@dataclass(frozen=True)
class ResidualShape:
    """A residual scheme; every number is a function of the model's layers."""

    is_normalised: bool
    """The residual is the norm's output, not its input."""
    alpha: Callable[[int], float]
    """Factor on the residual, unless the model gives one."""
    inner_gain: Callable[[int], float]
    """Xavier gain of value projections and of a FFN's first matrices."""
    output_gain: Callable[[int], float]
    """Xavier gain of the last matrix of a sub-layer."""


def _deepnorm_gain(layers: int) -> float:
    return (8.0 * layers) ** -0.25


RESIDUALS = {
    "deepnorm": ResidualShape(True, lambda layers: (2.0 * layers) ** 0.25, _deepnorm_gain, _deepnorm_gain),
    "prenorm": ResidualShape(False, lambda _: 1.0, lambda _: 1.0, lambda layers: (2.0 * layers) ** -0.5),
}


def residual_alpha(model: ModelConfig) -> float:
    """Factor on the residual: the model's own, or its scheme's."""
    given = model.residual_alpha
    return given if given is not None else RESIDUALS[model.residual].alpha(model.num_layers)


def inner_gain(model: ModelConfig) -> float:
    """Xavier gain of value projections and of a FFN's first matrices."""
    return RESIDUALS[model.residual].inner_gain(model.num_layers)


def output_gain(model: ModelConfig) -> float:
    """Xavier gain of the last matrix of a sub-layer."""
    return RESIDUALS[model.residual].output_gain(model.num_layers)
