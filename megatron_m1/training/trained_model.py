"""A model that is being trained, built from a resolved configuration: chunks, initial weights, DDP, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from torch import Tensor

from megatron_m1.config import ResolvedConfig
from megatron_m1.layers.engine import engine_config
from megatron_m1.model.build import build_chunk
from megatron_m1.model.initialise import initialise_weights
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.plan.flops import layout_cost
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.objective import NextToken, Objective
from megatron_m1.training.optimizer import build_optimizer, wrap_chunks


@dataclass
class TrainedModel:
    """One rank's share of a model that is being trained: what a step works on and a checkpoint holds."""

    mesh: Mesh
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    seq_length: int
    """Tokens of a pack, at most."""
    pack_tokens: int
    """Tokens of a pack once its end is padded."""
    cost: ModelCost | None = None
    """What layouts balance over context-parallel ranks; None leaves them in zigzag order."""
    objective: Objective = field(default_factory=NextToken)
    """What a step minimises."""
    heartbeat: Callable[[], None] = lambda: None
    """Called before every micro-batch's forward pass."""

    def connect(self) -> None:
        """Give megatron-core's schedules the functions that they call on the wrapped chunks."""
        overlap = self.chunks[0].ddp_config
        many = len(self.chunks) > 1
        for chunk in self.chunks:
            config = chunk.config
            config.finalize_model_grads_func = finalize_undivided
            if overlap.overlap_grad_reduce:
                no_sync = [c.no_sync for c in self.chunks]
                config.no_sync_func = no_sync if many else no_sync[0]
                if many:
                    config.grad_sync_func = [c.start_grad_sync for c in self.chunks]
            if overlap.overlap_param_gather:
                gather = [c.start_param_sync for c in self.chunks]
                config.param_sync_func = gather if many else None


def finalize_undivided(
    model: list[Any], num_tokens: Tensor | None, pg_collection: Any = None, force_all_reduce: bool = False
) -> None:
    """Reduce the gradients over the ranks and leave the division to the step.

    megatron-core's own counts whole tokens and never divides by less than 1, but an objective's weight is any fraction.
    """
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


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


def build_trained_model(
    config: ResolvedConfig,
    mesh: Mesh,
    *,
    objective: Objective | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> TrainedModel:
    """Build everything that a training step needs.

    Args:
        config: of the run.
        mesh: from ``mesh.initialise``.
        objective: what to minimise; default: the loss of the next token.
        heartbeat: called before every micro-batch and every save, so that neither is taken for a hang.
    """
    chunks = wrap_chunks(build_chunks(config, mesh), config)
    optimizer = build_optimizer(chunks, config, parameter_dtype(config))
    trained = TrainedModel(
        mesh=mesh,
        chunks=chunks,
        optimizer=optimizer,
        seq_length=config.data.seq_length,
        pack_tokens=config.padded_pack_tokens,
        cost=layout_cost(config.model),
        objective=objective or NextToken(),
        heartbeat=heartbeat,
    )
    trained.connect()
    return trained
