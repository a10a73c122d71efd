"""DDP and the sharded optimizer around the model's chunks, all of it megatron-core's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    ChainedOptimizer,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_m1.config import ResolvedConfig
from megatron_m1.layers.registry import sub_layers
from megatron_m1.training.adam import use_fused_adam


def wrap_chunks(chunks: list[GPTModel], config: ResolvedConfig) -> list[DistributedDataParallel]:
    """Give every chunk megatron-core's DDP: contiguous fp32 gradient buffers, reduced and sharded over data parallel
    ranks.

    Expert parameters are marked first, so that the number of optimizers (dense, expert) is the same on every mesh and a
    checkpoint of one can be loaded by another.
    """
    for chunk in chunks:
        for _, kind, module in sub_layers(chunk):
            for parameter in kind.expert_parameters(module):
                parameter.allreduce = False  # type: ignore[attr-defined]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    return [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]


def build_optimizer(
    chunks: list[DistributedDataParallel], config: ResolvedConfig, dtype: torch.dtype
) -> ChainedOptimizer:
    """AdamW with ZeRO-1 sharding over data parallel ranks; weight decay on matrices only.

    In a bf16 model the fp32 parameters (router, head) get a parameter group of their own: the distributed optimizer
    orders a group of mixed dtypes differently in two places.
    """
    use_fused_adam()
    settings = config.optimizer
    engine = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(engine)
    if dtype == torch.bfloat16:
        # wd_mult 1 is the default: naming it only makes the key of a separate group.
        is_fp32_matrix = ParamPredicate(name="fp32", fn=lambda p: p.dtype == torch.float32 and p.dim() > 1)
        overrides[ParamKey(predicate=is_fp32_matrix)] = {"wd_mult": 1.0}
    optimizer = get_megatron_optimizer(engine, chunks, config_overrides=overrides)
    assert isinstance(optimizer, ChainedOptimizer)
    return optimizer


def set_clip_grad(optimizer: ChainedOptimizer, norm: float) -> None:
    """Scale gradients down to ``norm`` from now on; 0 turns clipping off."""
    for part in optimizer.chained_optimizers:
        part.config.clip_grad = norm


def step_if_finite(
    optimizer: ChainedOptimizer, lr: float, admits: Callable[[float], bool] = lambda norm: True
) -> tuple[bool, float]:
    """Clip and apply the gradients, unless their norm is not finite or not admitted.

    Args:
        optimizer: from ``build_optimizer``.
        lr: learning rate of this step.
        admits: whether gradients of that finite norm are applied, the same on every rank; called before they are
            clipped.

    Returns:
        Whether parameters were updated, and the gradient norm before clipping (the same on every rank).
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm) or not admits(norm):
        return False, norm
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    return bool(optimizer.step_with_ready_grads()), norm
