"""From a resolved configuration to a trainer: model chunks, initial weights, DDP, optimizer."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)

from megatron_m1.config import ResolvedConfig
from megatron_m1.layers.engine import engine_config
from megatron_m1.model.build import build_chunk
from megatron_m1.model.initialise import initialise_weights
from megatron_m1.plan.flops import layout_cost
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.optimizer import build_optimizer, wrap_chunks
from megatron_m1.training.step import Trainer


def parameter_dtype(config: ResolvedConfig) -> torch.dtype:
    """dtype of parameters and matrix products for ``train.precision``."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def build_chunks(config: ResolvedConfig, mesh: Mesh) -> list[GPTModel]:
    """Build this rank's pipeline chunks with their initial weights."""
    dtype = parameter_dtype(config)
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunk = build_chunk(
            engine_config(config, dtype=dtype),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_length,
            implementation=config.model.transformer_impl,
            pre_process=is_vp_first_stage(vp_stage, virtual) and is_pp_first_stage(mesh.groups.pp),
            post_process=is_vp_last_stage(vp_stage, virtual) and is_pp_last_stage(mesh.groups.pp),
            vp_stage=vp_stage,
        )
        initialise_weights(chunk, vocab_size=config.model.vocab_size, seed=config.train.seed)
        chunks.append(chunk)
    return chunks


def build_trainer(config: ResolvedConfig, mesh: Mesh) -> Trainer:
    """Build everything that a training step needs.

    Args:
        config: of the run.
        mesh: from ``mesh.initialise``.
    """
    chunks = wrap_chunks(build_chunks(config, mesh), config)
    optimizer = build_optimizer(chunks, config, parameter_dtype(config))
    trainer = Trainer(
        mesh=mesh,
        chunks=chunks,
        optimizer=optimizer,
        seq_length=config.data.seq_length,
        pack_tokens=config.padded_pack_tokens,
        cost=layout_cost(config.model),
    )
    trainer.connect()
    return trainer
