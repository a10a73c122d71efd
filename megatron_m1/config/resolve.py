"""Fill in the derived fields of a configuration and refuse, in one line, what can't run.

Nothing here imports torch or starts a process: a wrong configuration costs a second, not a job. What concerns files
(data, tokenizer, run folder) is in ``megatron_m1.training.preflight``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
from itertools import pairwise

from megatron_m1.config.pipeline import Stages, plan_stages
from megatron_m1.config.resolved import (
    ResolvedConfig,
    ResolvedDataConfig,
    ResolvedModelConfig,
    ResolvedParallelConfig,
    ResolvedTrainConfig,
)
from megatron_m1.config.tracking import check_tracking
from megatron_m1.config.tree import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_m1.printing import counted
from megatron_m1.shapes.kind import check_divides
from megatron_m1.shapes.registry import check_layers, check_layers_device, check_layers_split
from megatron_m1.shapes.residual import residual_alpha

RECOMPUTABLE = ("core_attn", "moe")


def resolve(config: Config, world_size: int, *, has_gpu: bool) -> ResolvedConfig:
    """Return a copy of ``config`` whose derived fields are filled in, after checking that it can run.

    Args:
        config: as read; fields left at None or auto are derived here.
        world_size: processes over all nodes.
        has_gpu: whether the processes run on GPUs.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    check_model(config.model)
    _check_train(config)
    resolved = _filled_in(copy.deepcopy(config), has_gpu=has_gpu)
    check_mesh(resolved.parallel, world_size)
    check_split(resolved)
    check_batch(resolved, world_size)
    _check_recompute(resolved.train, plan_stages(resolved.model, resolved.parallel))
    check_optimizer(resolved.optimizer)
    _check_software(resolved, has_gpu=has_gpu)
    return resolved


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of replicas of the dense layers: what tensor, context and pipeline parallelism leave of the world."""
    size = parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // size


def _filled_in(config: Config, *, has_gpu: bool) -> ResolvedConfig:
    return ResolvedConfig(
        **vars(config)
        | {
            "model": _filled_in_model(config.model, has_gpu=has_gpu),
            "parallel": resolve_mesh(config, has_gpu=has_gpu),
            "data": _filled_in_data(config),
            "train": ResolvedTrainConfig(
                **vars(config.train)
                | {"precision": _unless_auto(config.train.precision, "bf16" if has_gpu else "fp32")}
            ),
            "asked": config,
        }
    )


def _filled_in_model(model: ModelConfig, *, has_gpu: bool) -> ResolvedModelConfig:
    engine_is_there = has_gpu and importlib.util.find_spec("transformer_engine") is not None
    modules = _unless_auto(model.transformer_impl, "transformer_engine" if engine_is_there else "local")
    return ResolvedModelConfig(**vars(model) | {"residual_alpha": residual_alpha(model), "transformer_impl": modules})


def resolve_mesh(config: Config, *, has_gpu: bool) -> ResolvedParallelConfig:
    """Fill in the mesh's derived fields, as ``resolve`` does.

    Raises:
        ValueError: a size is not above 0, or the stages can't be laid out.
    """
    parallel = config.parallel
    _check_positive("parallel", parallel, [name for name in vars(parallel) if name.endswith("_parallel_size")])
    expert_tensor, by_sequence = parallel.expert_tensor_parallel_size, parallel.sequence_parallel
    stages = plan_stages(config.model, parallel)
    derived = {
        "expert_tensor_parallel_size": 1 if expert_tensor is None else expert_tensor,
        "sequence_parallel": parallel.tensor_model_parallel_size > 1 if by_sequence is None else by_sequence,
        "distributed_backend": _unless_auto(parallel.distributed_backend, "nccl" if has_gpu else "gloo"),
        "virtual_pipeline_model_parallel_size": stages.chunks_per_rank if stages.chunks_per_rank > 1 else None,
    }
    return ResolvedParallelConfig(**vars(parallel) | derived)


def _filled_in_data(config: Config) -> ResolvedDataConfig:
    data, train = config.data, config.train
    cache = data.cache_folder if data.cache_folder is not None else f"{config.run.folder.rstrip('/')}/data_cache"
    samples = data.train_samples if data.train_samples is not None else train.max_steps * train.global_batch_size
    return ResolvedDataConfig(**vars(data) | {"cache_folder": cache, "train_samples": samples})


def _unless_auto(value: str, derived: str) -> str:
    return derived if value == "auto" else value


def _check_positive(group: str, values: object, names: list[str]) -> None:
    for name in names:
        value = getattr(values, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{group}.{name} = {value}: it must be a finite number above 0")


def _check_not_negative(group: str, values: object, names: list[str]) -> None:
    for name in names:
        value = getattr(values, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{group}.{name} = {value}: it must be a finite number, 0 or above")


MAX_LAYERS = 100_000
"""Layers of a model: far beyond any, and few enough to be counted one by one."""


def check_model(model: ModelConfig) -> None:
    """Check the model's own shape, and what its kinds of layers say of it.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    may_be_zero = {"moe_aux_loss_coeff", "residual_beta"}
    numbers = [
        name
        for name, value in vars(model).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in may_be_zero
    ]
    _check_positive("model", model, numbers)
    _check_not_negative("model", model, sorted(may_be_zero))
    if model.num_layers > MAX_LAYERS:
        raise ValueError(f"model.num_layers = {model.num_layers}: no more than {MAX_LAYERS:,} are planned one by one")
    check_layers(model)


def check_mesh(parallel: ResolvedParallelConfig, world_size: int) -> None:
    """Check that the two grids (dense and expert) tile the world.

    Raises:
        ValueError: with one line that shows the product.
    """
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, expert = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size
    product = tensor * context * pipeline
    if world_size % product:
        raise ValueError(
            f"the mesh does not divide the world: tensor {tensor} x context {context} x pipeline {pipeline} = "
            f"{product} ranks, but there {_processes(world_size)}; start a multiple of {product} or "
            "make the mesh smaller"
        )
    stage_ranks = world_size // pipeline
    block = expert * expert_tensor
    if stage_ranks % block:
        raise ValueError(
            f"the expert mesh does not divide a pipeline stage: expert {expert} x expert tensor {expert_tensor} = "
            f"{block} ranks, but a stage has {stage_ranks} (world {world_size} / pipeline {pipeline}): start a "
            f"multiple of {pipeline * block} processes (--nproc-per-node here, --world-size for a dry run) or lower "
            "parallel.expert_model_parallel_size"
        )


def _processes(count: int) -> str:
    return "is 1 process" if count == 1 else f"are {count} processes"


def check_split(config: ResolvedConfig) -> None:
    """Check that the model can be cut as the mesh asks: heads, experts, matrices, tokens.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    # megatron-core's own configuration insists on heads and groups that divide, whichever kinds the layers are.
    check_divides("model.num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tensor)
    check_divides("model.vocab_size", model.vocab_size, "tensor_model_parallel_size", tensor)
    groups = model.num_query_groups
    if groups % tensor and tensor % groups:
        raise ValueError(
            f"model.num_query_groups = {groups} is neither a multiple nor a divisor of "
            f"parallel.tensor_model_parallel_size = {tensor}: change one of them"
        )
    check_layers_split(model, parallel)
    context, tokens = parallel.context_parallel_size, config.data.seq_length
    if context > 1 and tokens < 2 * context:
        raise ValueError(
            f"parallel.context_parallel_size = {context} needs packs of at least {2 * context} tokens, two segments a "
            f"rank, but data.seq_length = {tokens}: use at most {max(1, tokens // 2)}"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.sequence_parallel = false with parallel.tensor_model_parallel_size = {tensor}: experts need it, "
            "leave it out"
        )


def check_batch(config: ResolvedConfig, world_size: int) -> None:
    """Check that the global batch and the held-out packs can be dealt out over data-parallel ranks and the pipeline.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    parallel, train = config.parallel, config.train
    _check_positive("train", train, ["global_batch_size"])
    replicas = data_parallel_size(parallel, world_size)
    pipeline, samples = parallel.pipeline_model_parallel_size, train.global_batch_size
    dealt = {"train.global_batch_size": samples}
    if config.data.validation or config.data.embedded_corpus:
        dealt["train.eval_samples"] = train.eval_samples
    for name, packs in dealt.items():
        if packs % replicas:
            raise ValueError(
                f"{name} = {packs} is not divisible by the data-parallel size {replicas} (world {world_size} / tensor "
                f"{parallel.tensor_model_parallel_size} / context {parallel.context_parallel_size} / pipeline "
                f"{pipeline}): use a multiple of {replicas}"
            )
        if parallel.virtual_pipeline_model_parallel_size and packs // replicas % pipeline:
            raise ValueError(
                f"{name} = {packs} gives each rank {counted(packs // replicas, 'micro-batch', 'micro-batches')}, but "
                f"interleaved stages need a multiple of parallel.pipeline_model_parallel_size = {pipeline}: use a "
                f"multiple of {replicas * pipeline}"
            )
    if config.data.train_samples < train.global_batch_size:
        raise ValueError(
            f"data.train_samples = {config.data.train_samples} is less than train.global_batch_size = "
            f"{train.global_batch_size}: raise it"
        )


def _check_recompute(train: TrainConfig, stages: Stages) -> None:
    strange = [name for name in train.recompute_modules if name not in RECOMPUTABLE]
    if "layernorm" in strange:
        raise ValueError(
            "train.recompute_modules has layernorm: this layer's residual is the norm's output, which recomputing "
            f"frees too early; use {' or '.join(RECOMPUTABLE)}"
        )
    if strange:
        raise ValueError(f"train.recompute_modules has {strange[0]!r}: choose from {', '.join(RECOMPUTABLE)}")
    if train.recompute_granularity == "selective" and not train.recompute_modules:
        raise ValueError(f"train.recompute_modules is empty: choose from {', '.join(RECOMPUTABLE)}")
    _check_positive("train", train, ["recompute_num_layers"])
    if train.recompute_granularity == "full" and train.recompute_num_layers > stages.most_layers:
        raise ValueError(
            f"train.recompute_num_layers = {train.recompute_num_layers} is more than the "
            f"{counted(stages.most_layers, 'layer')} of the largest stage: lower it"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Check AdamW's numbers and the schedule's.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    _check_positive("optimizer", optimizer, ["lr", "adam_eps"])
    _check_not_negative(
        "optimizer", optimizer, [f.name for f in dataclasses.fields(optimizer) if f.name != "lr_decay_style"]
    )
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, name) >= 1:
            raise ValueError(f"optimizer.{name} = {getattr(optimizer, name)}: it must be below 1")
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}: lower it")
    if optimizer.lr_decay_style == "exponential" and optimizer.lr_decay_tokens and optimizer.min_lr == 0:
        raise ValueError("optimizer.min_lr = 0 can't be reached by exponential decay: give it a value above 0")


def _check_train(config: Config) -> None:
    train, run, data = config.train, config.run, config.data
    _check_positive("train", train, ["max_steps", "max_skipped_steps"])
    _check_not_negative("train", train, ["seed", "eval_interval", "eval_samples"])
    _check_positive("data", data, ["train_samples"])
    _check_points(config)
    _check_spike_guard(train)
    if data.seq_length < 2:
        raise ValueError(f"data.seq_length = {data.seq_length}: a pack needs at least 2 tokens")
    _check_positive("run", run, ["log_interval", "max_failed_saves"])
    _check_not_negative("run", run, ["save_interval", "save_interval_minutes", "keep_checkpoints"])
    _check_positive("parallel", config.parallel, ["distributed_timeout_seconds"])
    start, end = train.profile_step_start, train.profile_step_end
    if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start < end):
        raise ValueError(
            f"train.profile_step_start = {start} and profile_step_end = {end}: give both, the start below the end"
        )
    if not run.folder:
        raise ValueError("run.folder is empty: give the folder of the run")
    if data.cache_folder == "":
        raise ValueError("data.cache_folder is empty: give a folder, or null for the run's own")
    check_tracking(run)


def _check_spike_guard(train: TrainConfig) -> None:
    _check_not_negative("train", train, ["grad_norm_interval", "max_spikes"])
    if not (train.spike_factor > 1 and math.isfinite(train.spike_factor)):
        raise ValueError(f"train.spike_factor = {train.spike_factor}: it must be a finite number above 1")
    if train.spike_window < 2:
        raise ValueError(f"train.spike_window = {train.spike_window}: a median needs at least 2 steps")
    if train.spike_guard == "rollback" and not train.max_spikes:
        raise ValueError("train.max_spikes = 0 with train.spike_guard rollback might go back for ever: give 1 or more")


def _check_points(config: Config) -> None:
    name, points = "train.moe_aux_loss_coeff_schedule", config.train.moe_aux_loss_coeff_schedule
    if not points:
        return
    tokens, weights = points[::2], points[1::2]
    if len(tokens) != len(weights):
        raise ValueError(
            f"{name} has {len(points)} numbers: give pairs of tokens and weight, as [0, 0.01, 1e12, 0.001]"
        )
    if not all(math.isfinite(number) and number >= 0 for number in points):
        raise ValueError(f"{name} = {points}: all numbers must be finite, and 0 or above")
    if any(b <= a for a, b in pairwise(tokens)):
        raise ValueError(f"{name} = {points}: the tokens of its points must rise")
    if config.model.moe_router_load_balancing_type == "none":
        raise ValueError(f"{name} is given, but model.moe_router_load_balancing_type is none: leave one of them out")


def _check_software(config: ResolvedConfig, *, has_gpu: bool) -> None:
    model, parallel = config.model, config.parallel
    if parallel.distributed_backend == "nccl" and not has_gpu:
        raise ValueError("parallel.distributed_backend = nccl needs GPUs, and there are none: use gloo or auto")
    if model.transformer_impl == "transformer_engine":
        if not has_gpu:
            raise ValueError(
                "model.transformer_impl = transformer_engine needs GPUs, and there are none: use local or auto"
            )
        if importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(
                "model.transformer_impl = transformer_engine, but that package is not installed: see GPU extras in the "
                "README, or use local"
            )
    if model.fp8 is not None and model.transformer_impl != "transformer_engine":
        raise ValueError(
            f"model.fp8 = {model.fp8} needs model.transformer_impl transformer_engine, but it is "
            f"{model.transformer_impl}"
        )
    if model.fp8 is not None and config.train.precision != "bf16":
        raise ValueError(f"model.fp8 = {model.fp8} needs train.precision bf16, but it is {config.train.precision}")
    check_layers_device(model, precision=config.train.precision, has_gpu=has_gpu)
    _check_positive("parallel", parallel, ["moe_token_groups"])
    if parallel.moe_token_groups > config.data.seq_length:
        raise ValueError(
            f"parallel.moe_token_groups = {parallel.moe_token_groups} is more than the tokens of a pack, "
            f"data.seq_length = {config.data.seq_length}: use a few"
        )
    if parallel.moe_token_groups > 1 and model.moe_token_dispatcher_type != "alltoall":
        raise ValueError(
            f"parallel.moe_token_groups = {parallel.moe_token_groups} needs model.moe_token_dispatcher_type alltoall, "
            f"but it is {model.moe_token_dispatcher_type}: change one of them"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce: turn it on as well")
