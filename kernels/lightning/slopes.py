"""The fixed decay slopes of MiniMax-M1's lightning heads: exp(-slope) is a head's decay per token."""

import math

import torch
from torch import Tensor


def _power_of_two_slopes(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


def head_slopes(num_heads: int) -> Tensor:
    """Slopes of a layer's heads before the layer factor: 2^(-8 (h + 1) / num_heads), as in ALiBi.

    For a number of heads that is no power of two, those of the power of two below, then every other slope of the
    power of two above.

    Args:
        num_heads: lightning heads of the whole layer (not of one tensor-parallel rank), at least 1.

    Returns:
        [num_heads] float32 on the CPU, per token, no gradient.

    Raises:
        ValueError: num_heads below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}: lightning attention needs at least 1 head")
    below = 2 ** int(math.log2(num_heads))
    slopes = _power_of_two_slopes(below) + _power_of_two_slopes(2 * below)[0::2][: num_heads - below]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def layer_slopes(num_heads: int, layer_index: int, num_layers: int) -> Tensor:
    """Slopes of one layer: ``head_slopes`` times 1 - layer_index / (num_layers - 1) + 1e-5. Deeper layers forget less.

    Args:
        num_heads: lightning heads of the whole layer; a tensor-parallel rank takes its slice of the result.
        layer_index: global index, from 0, counted over *all* layers of the model, softmax layers too; never the
            index within a pipeline stage.
        num_layers: all layers of the model. With 1 the factor is 1 + 1e-5.

    Returns:
        [num_heads] float32 on the CPU, per token, no gradient.

    Raises:
        ValueError: num_heads or num_layers below 1, or layer_index outside [0, num_layers).
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}: a model has at least 1 layer")
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index is {layer_index}: give the global index, 0 to {num_layers - 1}")
    depth = layer_index / (num_layers - 1) if num_layers > 1 else 0.0
    return head_slopes(num_heads) * (1.0 - depth + 1e-5)
