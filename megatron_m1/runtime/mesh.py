"""The rank grid: process groups of a run, set up once and passed on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed as dist

from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.runtime import cpu
from megatron_m1.runtime.watchdog import process_group_timeout


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid."""

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    data_parallel_rank: int
    data_parallel_size: int
    counts_loss: bool
    """The one tensor-parallel rank of each last stage that reports the loss."""


def _initialise_torch(parallel: ResolvedParallelConfig) -> torch.device:
    on_gpu = torch.cuda.is_available()
    backend = parallel.distributed_backend
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = process_group_timeout(backend, parallel.distributed_timeout_seconds)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _connect_context_ranks(device: torch.device) -> None:
    """Make NCCL's communicator while all ranks are here: a first message between two would wait for the others."""
    if device.type == "cuda" and parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(torch.zeros(1, device=device), group=parallel_state.get_context_parallel_group())


def initialise(parallel: ResolvedParallelConfig, *, seed: int) -> Mesh:
    """Start torch.distributed (unless it is running) and megatron-core's process groups.

    Args:
        parallel: resolved mesh.
        seed: of megatron-core's generators, which nothing in M1 draws from (no dropout) but recompute saves.
    """
    cpu.install()
    device = _initialise_torch(parallel)
    timeout = process_group_timeout(dist.get_backend(), parallel.distributed_timeout_seconds)
    # Order follows Megatron: tensor ranks are neighbours, then context, expert, data, pipeline.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=True,
    )
    # The one group that megatron-core makes with torch's half an hour; it gathers the experts' optimizer state.
    parallel_state.get_expert_data_parallel_group_gloo().set_timeout(timeout)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _connect_context_ranks(device)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        counts_loss=last and parallel_state.get_tensor_model_parallel_rank() == 0,
    )


def shut_down() -> None:
    """Tear down megatron-core's groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
