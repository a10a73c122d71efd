"""The whole model on one process, with weights from any source."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece
from megatron_m1.convert.hub_folder import HubFolder
from megatron_m1.convert.our_checkpoint import OurCheckpoint
from megatron_m1.layers.engine import engine_config
from megatron_m1.layers.moe import parameter_of_expert
from megatron_m1.model.build import build_chunk
from megatron_m1.runtime import mesh


def _parameter_name(unit: WeightPiece) -> str:
    return unit.ours if unit.expert is None else parameter_of_expert(unit.ours, unit.expert)


def fill(model: GPTModel, source: OurCheckpoint | HubFolder) -> None:
    """Overwrite every parameter of a whole model, one at a time.

    Raises:
        ValueError: the source can't be read.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for unit in source.units:
            parameter = parameters.pop(_parameter_name(unit))
            # [1, rows, columns] of a stack of experts -> [rows, columns]
            parameter.copy_(source.read(unit).view(parameter.shape))
    assert not parameters, list(parameters)


def build_model(source: OurCheckpoint | HubFolder, dtype: torch.dtype) -> GPTModel:
    """Build the model of a source for generation: in evaluation mode, dropping no token, on a GPU if there is one.

    Starts torch.distributed and megatron-core's groups with one process.

    Args:
        source: opened checkpoint or Hugging Face folder.
        dtype: of parameters and products.

    Raises:
        ValueError: the source can't be read.
    """
    shape: ModelConfig = dataclasses.replace(
        source.model, moe_expert_capacity_factor=None, transformer_impl="local", fp8=None
    )
    config = resolve(Config(model=shape), 1, has_gpu=torch.cuda.is_available())
    mesh.initialise(config.parallel, seed=0)
    model = build_chunk(
        engine_config(config, dtype=dtype),
        vocab_size=shape.vocab_size,
        max_sequence_length=config.data.seq_length,
    )
    fill(model, source)
    return model.eval()
