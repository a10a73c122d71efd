"""The decay slopes against their closed form and against transformers' MiniMax."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from megatron_m1.kernels.lightning import head_slopes, layer_slopes

# A value is computed in double precision, rounded once to float32, and multiplied by a rounded factor.
FLOAT32_ROUNDING = 4 * 2.0**-24


def test_heads_of_m1() -> None:
    expected = [2.0 ** (-8 * (h + 1) / 64) for h in range(64)]
    assert head_slopes(64).tolist() == pytest.approx(expected, rel=FLOAT32_ROUNDING)
    assert head_slopes(64)[0].item() == pytest.approx(0.917004, abs=1e-6)
    assert head_slopes(64)[63].item() == 0.00390625


@pytest.mark.parametrize("layer", [0, 1, 39, 78, 79])
def test_layers_of_m1(layer: int) -> None:
    expected = [2.0 ** (-8 * (h + 1) / 64) * (1 - layer / 79 + 1e-5) for h in range(64)]
    slopes = layer_slopes(64, layer, 80)
    assert slopes.tolist() == pytest.approx(expected, rel=FLOAT32_ROUNDING)
    assert slopes.dtype == torch.float32 and slopes.device.type == "cpu" and not slopes.requires_grad


def test_half_lives_of_m1() -> None:
    """The longest and the shortest memory among the lightning layers, in tokens."""
    assert math.log(2) / layer_slopes(64, 0, 80)[0].item() == pytest.approx(0.76, abs=0.005)
    assert math.log(2) / layer_slopes(64, 78, 80)[63].item() == pytest.approx(14_007, abs=1)


def test_heads_that_are_no_power_of_two() -> None:
    below = [2.0 ** (-(h + 1)) for h in range(8)]
    between = [2.0 ** (-(h + 1) / 2) for h in range(0, 8, 2)]
    assert head_slopes(12).tolist() == pytest.approx(below + between, rel=FLOAT32_ROUNDING)
    assert head_slopes(1).tolist() == [2.0**-8]


def test_one_layer() -> None:
    assert layer_slopes(8, 0, 1).tolist() == pytest.approx((head_slopes(8) * (1 + 1e-5)).tolist(), rel=FLOAT32_ROUNDING)


@pytest.mark.parametrize(("num_heads", "num_layers"), [(64, 80), (8, 8)])
def test_slopes_are_those_of_transformers(num_heads: int, num_layers: int) -> None:
    config = MiniMaxConfig(
        hidden_size=num_heads, num_attention_heads=num_heads, head_dim=1, num_hidden_layers=num_layers, block_size=1
    )
    # transformers divides the layer index by (L - 1 + 1e-5) where M1 divides by L - 1.
    factor_difference = 1e-5 / (num_layers - 1)
    for layer in range(num_layers):
        theirs = MiniMaxLightningAttention(config, layer).slope_rate.flatten()
        assert layer_slopes(num_heads, layer, num_layers).tolist() == pytest.approx(
            theirs.tolist(), rel=FLOAT32_ROUNDING, abs=factor_difference + FLOAT32_ROUNDING
        )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads is 0"):
        head_slopes(0)
    with pytest.raises(ValueError, match="num_layers is 0"):
        layer_slopes(8, 0, 0)
    with pytest.raises(ValueError, match="layer_index is 80: give the global index, 0 to 79"):
        layer_slopes(8, 80, 80)
    with pytest.raises(ValueError, match="layer_index is -1"):
        layer_slopes(8, -1, 80)
