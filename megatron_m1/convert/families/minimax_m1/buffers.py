"""The buffers that native transformers saves in every lightning layer, for ``--format native``.

They are tables of powers of the decay, computed from the layer's index alone. The layer factor is native transformers'
own, 1 - l / (L - 1 + 1e-5) + 1e-5, which differs from the hub's in the seventh digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_m1.config import ModelConfig
from megatron_m1.convert.families.minimax_m1.config import NATIVE_BLOCK
from megatron_m1.convert.families.minimax_m1.weights import NATIVE_BUFFERS, WeightPiece
from megatron_m1.convert.safetensors_files import Entry


def native_buffers(model: ModelConfig, layer: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a lightning layer's buffers in the order of ``NATIVE_BUFFERS``.

    Returns:
        slope_rate [heads, 1, 1], query_decay and key_decay [heads, 256, 1], diagonal_decay [1, heads, 256, 256], all of
        ``dtype``.
    """
    heads = model.num_attention_heads
    factor = 1 - layer / (model.num_layers - 1 + 1e-5) + 1e-5
    slopes = ((1 / 2 ** (8 / heads)) ** (torch.arange(heads) + 1) * factor)[:, None, None]  # [heads, 1, 1]
    steps = torch.arange(NATIVE_BLOCK) + 1
    ages = (steps[:, None] - steps[None, :])[None, None]  # [1, 1, 256, 256]
    falling = torch.where(ages >= 0, -(slopes * ages), float("-inf"))
    buffers = (
        slopes,
        torch.exp(-slopes * steps[:, None]),
        torch.exp(-slopes * (NATIVE_BLOCK - steps[:, None])),
        torch.exp(falling),
    )
    return [buffer.to(dtype) for buffer in buffers]


def buffers_layer(unit: WeightPiece) -> int | None:
    """Layer whose buffers native transformers saves after this unit, if it is followed by any."""
    return int(unit.ours.split(".")[2]) if unit.ours.endswith(".linear_qkvg.weight") else None


def buffer_entries(model: ModelConfig, layer: int, dtype: torch.dtype) -> list[Entry]:
    """Names, dtypes and shapes of a lightning layer's buffers."""
    with torch.device("meta"):
        shapes = [tuple(buffer.shape) for buffer in native_buffers(model, layer, dtype)]
    prefix = f"model.layers.{layer}.self_attn"
    return [Entry(f"{prefix}.{name}", dtype, shape) for name, shape in zip(NATIVE_BUFFERS, shapes, strict=True)]
