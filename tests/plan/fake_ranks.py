"""Any rank of any mesh in one process: torch's fake process groups, and a model without memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_pipeline_model_parallel_rank, initialize_model_parallel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.layers.engine import engine_config
from megatron_m1.model.build import build_chunk
from megatron_m1.runtime import cpu, mesh


def _connect(parallel: ResolvedParallelConfig) -> None:
    # As ``runtime.mesh`` does, without its gloo groups, which would look for the other ranks.
    cpu.install()
    initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0)


def chunk_sizes(config: ResolvedConfig, rank: int, world_size: int) -> int:
    """Numbers of all parameters that megatron-core builds for ``rank``."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _connect(config.parallel)
        stage, virtual = get_pipeline_model_parallel_rank(), config.parallel.virtual_pipeline_model_parallel_size
        stages, total = config.parallel.pipeline_model_parallel_size, 0
        for chunk in range(virtual or 1):
            with torch.device("meta"):
                model = build_chunk(
                    engine_config(config, dtype=torch.bfloat16, on_default_device=True),
                    vocab_size=config.model.vocab_size,
                    max_sequence_length=config.data.seq_length,
                    pre_process=stage == 0 and chunk == 0,
                    post_process=stage == stages - 1 and chunk == (virtual or 1) - 1,
                    vp_stage=chunk if virtual else None,
                )
            total += sum(parameter.numel() for parameter in model.parameters())
        return total
    finally:
        mesh.shut_down()


def rank_sizes(rank: int, world_size: int, configs: list[tuple[Config, int]]) -> list[list[int]]:
    """For each configuration and world, the numbers of the first rank of every pipeline stage."""
    found = []
    for asked, world in configs:
        config = resolve(asked, world, has_gpu=False)
        stages = config.parallel.pipeline_model_parallel_size
        found.append([chunk_sizes(config, world // stages * stage, world) for stage in range(stages)])
    return found
