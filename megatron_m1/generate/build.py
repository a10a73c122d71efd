"""The whole model with weights from any source."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_m1.checkpoint.contents import EXPERT_BIAS
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece
from megatron_m1.convert.hub_folder import HubFolder
from megatron_m1.convert.our_checkpoint import OurCheckpoint
from megatron_m1.layers.moe import parameter_of_expert
from megatron_m1.model.whole import build_whole


def _parameter_name(unit: WeightPiece) -> str:
    return unit.ours if unit.expert is None else parameter_of_expert(unit.ours, unit.expert)


def fill(model: GPTModel, source: OurCheckpoint | HubFolder) -> None:
    """Overwrite every parameter and the routers' biases of a whole model, one at a time.

    Raises:
        ValueError: the source can't be read.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    parameters |= {name: bias for name, bias in model.named_buffers() if name.endswith(EXPERT_BIAS)}
    with torch.no_grad():
        for unit in source.units:
            parameter = parameters.pop(_parameter_name(unit))
            # [1, rows, columns] of a stack of experts -> [rows, columns]
            parameter.copy_(source.read(unit).view(parameter.shape))
    assert not parameters, list(parameters)


def build_model(source: OurCheckpoint | HubFolder, dtype: torch.dtype, device: torch.device) -> GPTModel:
    """Build the model of a source: in evaluation mode, dropping no token.

    Args:
        source: opened checkpoint or Hugging Face folder.
        dtype: of parameters and products.
        device: where.

    Raises:
        ValueError: the source can't be read.
    """
    model = build_whole(source.model, dtype=dtype, device=device)
    fill(model, source)
    return model
