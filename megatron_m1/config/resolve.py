"""Fill in the derived fields of a configuration and refuse, in one line, what can't run.

Nothing here imports torch or starts a process: a wrong configuration costs a second, not a job. What concerns files
(data, tokenizer, run folder) is in ``megatron_m1.training.preflight``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import os

from megatron_m1.config.pipeline import Stages, plan_stages
from megatron_m1.config.tree import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig

RECOMPUTABLE = ("core_attn", "moe")
MOST_FLASH_CHANNELS = 256
"""Of a head, in torch's flash kernel."""


def resolve(config: Config, world_size: int, *, has_gpu: bool) -> Config:
    """Return a copy of ``config`` whose derived fields are filled in, after checking that it can run.

    Args:
        config: as read; fields left at None or auto are derived here.
        world_size: processes over all nodes.
        has_gpu: whether the processes run on GPUs.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    config = copy.deepcopy(config)
    check_model(config.model)
    _check_train(config)
    _fill_in(config, has_gpu=has_gpu)
    check_mesh(config.parallel, world_size)
    check_split(config)
    check_batch(config, world_size)
    _check_recompute(config.train, plan_stages(config.model, config.parallel))
    check_optimizer(config.optimizer)
    _check_software(config, has_gpu=has_gpu)
    return config


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of replicas of the dense layers: what tensor, context and pipeline parallelism leave of the world."""
    size = parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // size


def padded_pack_tokens(config: Config) -> int:
    """Tokens of a pack once its end is padded to what context and tensor parallelism divide."""
    parallel = config.parallel
    multiple = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    return -(-config.data.seq_length // multiple) * multiple


def _fill_in(config: Config, *, has_gpu: bool) -> None:
    model, parallel, train, data = config.model, config.parallel, config.train, config.data
    if model.residual_alpha is None:
        model.residual_alpha = (2.0 * model.num_layers) ** 0.25
    if model.transformer_impl == "auto":
        engine_is_there = has_gpu and importlib.util.find_spec("transformer_engine") is not None
        model.transformer_impl = "transformer_engine" if engine_is_there else "local"
    if parallel.expert_tensor_parallel_size is None:
        parallel.expert_tensor_parallel_size = 1
    if parallel.sequence_parallel is None:
        parallel.sequence_parallel = parallel.tensor_model_parallel_size > 1
    if parallel.distributed_backend == "auto":
        parallel.distributed_backend = "nccl" if has_gpu else "gloo"
    if train.precision == "auto":
        train.precision = "bf16" if has_gpu else "fp32"
    if data.cache_folder is None:
        data.cache_folder = f"{config.run.folder.rstrip('/')}/data_cache"
    if data.train_samples is None:
        data.train_samples = train.max_steps * train.global_batch_size
    _check_positive("parallel", parallel, [name for name in vars(parallel) if name.endswith("_parallel_size")])
    stages = plan_stages(model, parallel)
    parallel.virtual_pipeline_model_parallel_size = stages.chunks_per_rank if stages.chunks_per_rank > 1 else None


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
    """Check the model's own shape.

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
    if model.num_layers % model.attention_period:
        fits = max(1, round(model.num_layers / model.attention_period)) * model.attention_period
        raise ValueError(
            f"model.num_layers = {model.num_layers} is not a multiple of model.attention_period = "
            f"{model.attention_period}: {fits} would be"
        )
    if model.num_attention_heads % model.num_query_groups:
        raise ValueError(
            f"model.num_attention_heads = {model.num_attention_heads} is not divisible by model.num_query_groups = "
            f"{model.num_query_groups}: every key/value head serves equally many query heads"
        )
    if model.moe_router_topk > model.num_moe_experts:
        raise ValueError(
            f"model.moe_router_topk = {model.moe_router_topk} is more than model.num_moe_experts = "
            f"{model.num_moe_experts}: lower it"
        )
    rotated = model.kv_channels * model.rotary_percent
    even = 2 * round(rotated / 2)
    # The engine rounds it down.
    if model.rotary_percent > 1 or not math.isclose(rotated, even) or int(rotated) != even:
        raise ValueError(
            f"model.rotary_percent = {model.rotary_percent} of model.kv_channels = {model.kv_channels} rotates "
            f"{rotated:g} dimensions: it must be an even number up to {model.kv_channels}"
        )


def check_mesh(parallel: ParallelConfig, world_size: int) -> None:
    """Check that the two grids (dense and expert) tile the world.

    Raises:
        ValueError: with one line that shows the product.
    """
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, expert = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or 1
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


def check_split(config: Config) -> None:
    """Check that the model can be cut as the mesh asks: heads, experts, matrices, tokens.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    model, parallel = config.model, config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or 1
    _check_divides("model.num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tensor)
    _check_divides("model.vocab_size", model.vocab_size, "tensor_model_parallel_size", tensor)
    groups = model.num_query_groups
    if groups % tensor and tensor % groups:
        raise ValueError(
            f"model.num_query_groups = {groups} is neither a multiple nor a divisor of "
            f"parallel.tensor_model_parallel_size = {tensor}: change one of them"
        )
    _check_divides("model.num_moe_experts", model.num_moe_experts, "expert_model_parallel_size", expert)
    _check_divides("model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor_parallel_size", expert_tensor)
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


def _check_divides(name: str, value: int, size_name: str, size: int) -> None:
    if value % size:
        raise ValueError(
            f"{name} = {value} is not divisible by parallel.{size_name} = {size}: use a size that divides it, such as "
            f"{math.gcd(value, size)}"
        )


def check_batch(config: Config, world_size: int) -> None:
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
                f"{name} = {packs} gives each rank {packs // replicas} micro-batches, but interleaved stages need a "
                f"multiple of parallel.pipeline_model_parallel_size = {pipeline}: use a multiple of "
                f"{replicas * pipeline}"
            )
    if config.data.train_samples is not None and config.data.train_samples < train.global_batch_size:
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
            f"train.recompute_num_layers = {train.recompute_num_layers} is more than the {stages.most_layers} layers "
            "of the largest stage: lower it"
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
    if run.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"run.wandb_project = {run.wandb_project!r} needs the wandb package: pip install wandb")


def _check_software(config: Config, *, has_gpu: bool) -> None:
    model, parallel = config.model, config.parallel
    if parallel.distributed_backend == "nccl" and not has_gpu:
        raise ValueError("parallel.distributed_backend = nccl needs GPUs, and there are none: use gloo or auto")
    # Triton's own variable: its interpreter runs kernels on a CPU, which is for tests.
    if model.lightning_backend == "triton" and not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("model.lightning_backend = triton needs GPUs, and there are none: use auto or chunk")
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
    if has_gpu and config.train.precision == "fp32":
        raise ValueError(
            "train.precision = fp32 on GPUs: softmax attention is torch's flash kernel there, which takes 16 bits; "
            "give bf16 or auto"
        )
    if has_gpu and (model.kv_channels % 8 or model.kv_channels > MOST_FLASH_CHANNELS):
        raise ValueError(
            f"model.kv_channels = {model.kv_channels} on GPUs: torch's flash kernel takes multiples of 8 up to "
            f"{MOST_FLASH_CHANNELS}"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce: turn it on as well")
