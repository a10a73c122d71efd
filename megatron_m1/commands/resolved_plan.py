"""What ``--dry-run`` prints: the mesh, the stages, the parameters of a rank, the data and the length of the run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.config.resolve import data_parallel_size
from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import PrefixSummary
from megatron_m1.data.demo.corpus import vocabulary_notes
from megatron_m1.launch import Launch
from megatron_m1.plan.parameters import model_counts, rank_counts
from megatron_m1.training.preflight import check_data, check_folders, find_embedded_corpus, newest_checkpoint

BYTES = {"fp32": 4, "bf16": 2}


def where_from(launch: Launch | None) -> str:
    """Say where the world size comes from."""
    if launch is None:
        return "torchrun"
    return f"{launch.nodes} node{'s' if launch.nodes > 1 else ''} x {launch.processes_per_node}"


def describe_plan(config: ResolvedConfig, world_size: int, *, source: str, on_gpu: bool) -> list[str]:
    """Check the files of a resolved configuration and describe the run, line by line.

    Args:
        config: resolved for ``world_size``.
        world_size: processes over all nodes.
        source: where the world size comes from, in words.
        on_gpu: whether the plan is for GPUs.

    Raises:
        ValueError: the run folder or the data are not as the configuration says.
    """
    check_folders(config)
    data_lines = _data_lines(config)
    model, parallel, train = config.model, config.parallel, config.train
    counts, active = model_counts(model), model_counts(model, active=True)
    device = "gpu" if on_gpu else "cpu"
    newest = newest_checkpoint(config)
    return [
        f"plan        preset {config.preset}, {train.precision} on {device} over {parallel.distributed_backend}, "
        f"{model.transformer_impl} modules",
        f"world       {world_size} process{'es' if world_size > 1 else ''} ({source})",
        *_mesh_lines(parallel, world_size),
        f"model       {model.num_layers} layers, {counts.total:,} parameters, {active.total:,} active per token",
        *_stage_lines(config),
        *data_lines,
        *_length_lines(config, world_size),
        f"run folder  {config.run.folder}" + (f", goes on from {newest.name}" if newest else ""),
        "dry run: nothing was started",
    ]


def _mesh_lines(parallel: ResolvedParallelConfig, world_size: int) -> list[str]:
    expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    replicas = data_parallel_size(parallel, world_size)
    expert_replicas = world_size // (pipeline * expert * expert_tensor)
    return [
        f"mesh        tensor {parallel.tensor_model_parallel_size} x context {parallel.context_parallel_size} "
        f"x pipeline {pipeline} x data {replicas} = {world_size}",
        f"experts     expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline} "
        f"x expert data {expert_replicas} = {world_size}",
    ]


def _stage_lines(config: ResolvedConfig) -> list[str]:
    stages = plan_stages(config.model, config.parallel).by_rank
    size = BYTES[config.train.precision]
    lines = []
    for rank, (chunks, counts) in enumerate(zip(stages, rank_counts(config.model, config.parallel), strict=True)):
        held = " + ".join(_describe_chunk(chunk) for chunk in chunks)
        lines.append(
            f"stage {rank:<5} {held}: {counts.total:,} parameters a rank, {counts.total * size / 2**30:.2f} GiB in "
            f"{config.train.precision}"
        )
    return lines


def _describe_chunk(chunk: StageLayers) -> str:
    layers = chunk.layers
    if not layers:
        text = "no layer"
    elif len(layers) == 1:
        text = f"layer {layers[0]}"
    else:
        text = f"layers {layers[0]}-{layers[-1]}"
    return ("embedding, " if chunk.has_embedding else "") + text + (", head" if chunk.has_head else "")


def _data_lines(config: ResolvedConfig) -> list[str]:
    found = find_embedded_corpus(config)
    if found is None:
        data = config.data
        notes = vocabulary_notes(data.embedded_corpus, data.tokenizer, config.model.vocab_size)
        return [f"data        embedded corpus, to be built in {data.embedded_corpus}", *notes]
    config = found
    summary = check_data(config, only_plan=True)
    return [
        f"tokenizer   {config.data.tokenizer}, {summary.tokenizer_vocab_size:,} tokens",
        *_blend_lines("train", config.data.train, summary.train, tokens=_run_tokens(config)),
        *_blend_lines("validation", config.data.validation, summary.validation),
        *summary.notes,
    ]


def _run_tokens(config: ResolvedConfig) -> int:
    return config.train.max_steps * config.tokens_per_step


def _blend_lines(
    name: str, blend: Sequence[str], summaries: Sequence[PrefixSummary], *, tokens: int | None = None
) -> list[str]:
    """One line a corpus; with the ``tokens`` of the whole run, how often each is read."""
    if not blend:
        return [f"{name:<11} none"]
    _, weights = parse_blend(blend)
    return [
        f"{name:<11} {weight:.1%} {summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens"
        + (f", read {weight * tokens / summary.tokens:,.2f} times" if tokens else "")
        for weight, summary in zip(weights, summaries, strict=True)
    ]


def _length_lines(config: ResolvedConfig, world_size: int) -> list[str]:
    train, data = config.train, config.data
    replicas = data_parallel_size(config.parallel, world_size)
    return [
        f"batch       {train.global_batch_size} packs of {data.seq_length:,} tokens = "
        f"{config.tokens_per_step:,} tokens a step, {train.global_batch_size // replicas} micro-batches a rank",
        *_padding_lines(config),
        f"steps       {train.max_steps:,} = {_run_tokens(config):,} tokens",
    ]


def _padding_lines(config: ResolvedConfig) -> list[str]:
    context, tokens = config.parallel.context_parallel_size, config.padded_pack_tokens
    padding = tokens - config.data.seq_length
    if context == 1 and not padding:
        return []
    added = f", {padding} of them padding at its end" if padding else ""
    return [f"packs       {tokens:,} tokens each{added}, {tokens // context:,} on every context rank"]
