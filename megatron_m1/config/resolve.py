"""Fill in the derived fields of a configuration and refuse, in one line, what can't run.

Nothing here imports torch or starts a process: a wrong configuration costs a second, not a job. What concerns files
(data, tokenizer, run folder) is in ``megatron_m1.training.preflight``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math

from megatron_m1.config.check_training import check_optimizer, check_rates, check_run
from megatron_m1.config.numeric import check_not_negative, check_positive
from megatron_m1.config.pipeline import Stages, plan_stages
from megatron_m1.config.resolved import (
    ResolvedConfig,
    ResolvedDataConfig,
    ResolvedModelConfig,
    ResolvedParallelConfig,
    ResolvedTrainConfig,
)
from megatron_m1.config.schedules import DEFAULT_STEPS, START, Position, course, last_step_of
from megatron_m1.config.stages import Stage, stage_at, stages_of
from megatron_m1.config.tree import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_m1.printing import counted
from megatron_m1.shapes.kind import check_divides
from megatron_m1.shapes.registry import check_layers, check_layers_device, check_layers_split
from megatron_m1.shapes.residual import residual_alpha

RECOMPUTABLE = ("core_attn", "moe")


def resolve(config: Config, world_size: int, *, has_gpu: bool, at: Position = START) -> ResolvedConfig:
    """Return a copy of ``config`` whose derived fields are filled in, after checking that it can run.

    Args:
        config: as read; fields left at None or auto are derived here.
        world_size: processes over all nodes.
        has_gpu: whether the processes run on GPUs.
        at: how far the run is. Of a run with stages, the one in which it goes on is resolved, and all later ones are
            checked, on as many processes as their own mesh needs where it does not divide these.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    return resolve_stages(config, world_size, has_gpu=has_gpu, at=at)[0]


def resolve_stages(config: Config, world_size: int, *, has_gpu: bool, at: Position = START) -> list[ResolvedConfig]:
    """Return what ``resolve`` does for the stage in which a run goes on, and the same of all that follow it."""
    stages = stages_of(config)
    index, _ = stage_at(stages, at.begun, at.tokens)
    resolved = []
    for stage in stages[index:]:
        processes = world_size if stage.index == index else fitting_world(world_size, stage.config.parallel)
        resolved.append(_resolved_stage(config, stage, processes, has_gpu=has_gpu))
    check_rates(config)
    spans = course(config, at)
    steps = spans[-1].last_step if spans else min(last_step_of(config), at.step)
    return [
        dataclasses.replace(
            each, train=dataclasses.replace(each.train, max_steps=int(steps)), recipe=config, stage=index + number
        )
        for number, each in enumerate(resolved)
    ]


def _resolved_stage(recipe: Config, stage: Stage, world_size: int, *, has_gpu: bool) -> ResolvedConfig:
    try:
        return _resolved(stage.config, world_size, has_gpu=has_gpu)
    except ValueError as error:
        if not recipe.stages:
            raise
        raise ValueError(f"stage {stage.name}: {error}") from error


def _resolved(config: Config, world_size: int, *, has_gpu: bool) -> ResolvedConfig:
    check_model(config.model)
    check_run(config)
    check_optimizer(config.optimizer)
    resolved = resolve_split(config, world_size, has_gpu=has_gpu)
    check_batch(resolved, world_size)
    _check_capacity(resolved, world_size)
    _check_recompute(resolved.train, plan_stages(resolved.model, resolved.parallel))
    _check_software(resolved, has_gpu=has_gpu)
    return resolved


def resolve_split(config: Config, world_size: int, *, has_gpu: bool) -> ResolvedConfig:
    """Return ``config`` filled in, after checking that its mesh tiles the world and can cut its model; nothing else.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    resolved = _filled_in(copy.deepcopy(config), has_gpu=has_gpu)
    check_mesh(resolved.parallel, world_size)
    check_split(resolved)
    return resolved


def fitting_world(processes: int, parallel: ParallelConfig) -> int:
    """Return ``processes`` if a mesh divides them, else the fewest that it needs."""
    stages, experts = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    least = math.lcm(
        stages * parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        stages * experts * (parallel.expert_tensor_parallel_size or 1),
    )
    # No mesh has a size of 0, which is said later.
    return processes if least == 0 or processes % least == 0 else least


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
                | {
                    "max_steps": config.train.max_steps or DEFAULT_STEPS,
                    "precision": _unless_auto(config.train.precision, "bf16" if has_gpu else "fp32"),
                }
            ),
            "asked": config,
            "recipe": config,
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
    check_positive("parallel", parallel, [name for name in vars(parallel) if name.endswith("_parallel_size")])
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
    data = config.data
    cache = data.cache_folder if data.cache_folder is not None else f"{config.run.folder.rstrip('/')}/data_cache"
    return ResolvedDataConfig(**vars(data) | {"cache_folder": cache})


def _unless_auto(value: str, derived: str) -> str:
    return derived if value == "auto" else value


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
    check_positive("model", model, numbers)
    check_not_negative("model", model, sorted(may_be_zero))
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
        names = ("expert_model_parallel_size", "expert_tensor_parallel_size")
        larger = " or ".join(f"parallel.{name}" for name in names if getattr(parallel, name) > 1)
        raise ValueError(
            f"the expert mesh does not divide a pipeline stage: expert {expert} x expert tensor {expert_tensor} = "
            f"{block} ranks, but a stage has {stage_ranks} (world {world_size} / pipeline {pipeline}): start a "
            f"multiple of {pipeline * block} processes or lower {larger}"
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
    _check_exchange(config)


def check_batch(config: ResolvedConfig, world_size: int) -> None:
    """Check that the global batch and the held-out packs can be dealt out over data-parallel ranks and the pipeline.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    parallel, train = config.parallel, config.train
    check_positive("train", train, ["global_batch_size"])
    replicas = data_parallel_size(parallel, world_size)
    pipeline, ramp = parallel.pipeline_model_parallel_size, train.global_batch_size_schedule
    dealt = [("train.global_batch_size", train.global_batch_size)]
    if ramp:
        dealt = [("train.global_batch_size_schedule", int(packs)) for packs in ramp[1::2]]
    if config.data.validation or config.data.embedded_corpus:
        dealt.append(("train.eval_samples", train.eval_samples))
    for name, packs in dealt:
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


def _check_capacity(config: ResolvedConfig, world_size: int) -> None:
    factor = config.model.moe_expert_capacity_factor
    tokens = config.data.seq_length * data_parallel_size(config.parallel, world_size)
    share = tokens * config.model.moe_router_topk / config.model.num_moe_experts
    if factor is not None and factor * share < 1:
        raise ValueError(
            f"model.moe_expert_capacity_factor = {factor} leaves an expert less than one of a micro-batch's "
            f"{tokens:,} tokens, of which {share:g} are its balanced share: give 1 or so"
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
    check_positive("train", train, ["recompute_num_layers"])
    if train.recompute_granularity == "full" and train.recompute_num_layers > stages.most_layers:
        raise ValueError(
            f"train.recompute_num_layers = {train.recompute_num_layers} is more than the "
            f"{counted(stages.most_layers, 'layer')} of the largest stage: lower it"
        )


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


def _check_exchange(config: ResolvedConfig) -> None:
    model, parallel = config.model, config.parallel
    check_positive("parallel", parallel, ["moe_token_groups"])
    sharers = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    tokens = config.padded_pack_tokens // sharers
    if parallel.moe_token_groups > tokens:
        raise ValueError(
            f"parallel.moe_token_groups = {parallel.moe_token_groups} is more than the {counted(tokens, 'token')} that "
            f"a rank has of a pack, data.seq_length = {config.data.seq_length} / context and tensor ranks {sharers}: "
            "use a few"
        )
    if parallel.moe_token_groups > 1 and model.moe_token_dispatcher_type != "alltoall":
        raise ValueError(
            f"parallel.moe_token_groups = {parallel.moe_token_groups} needs model.moe_token_dispatcher_type alltoall, "
            f"but it is {model.moe_token_dispatcher_type}: change one of them"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce: turn it on as well")
