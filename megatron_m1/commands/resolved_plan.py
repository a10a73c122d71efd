"""What ``--dry-run`` prints: the mesh, the stages, the parameters of a rank, the data and the length of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.checkpoint.folder import step_of
from megatron_m1.commands.stage_table import stage_table
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.config.schedules import Position, course, schedules_at
from megatron_m1.convert.places import find_checkpoint
from megatron_m1.data.demo.corpus import vocabulary_notes
from megatron_m1.launch import Launch
from megatron_m1.plan.parameters import rank_counts
from megatron_m1.printing import counted
from megatron_m1.training.changes import changes_since, nothing_to_train, stream_lines
from megatron_m1.training.description import (
    Fact,
    batch_facts,
    blend_facts,
    lines_of,
    mesh_facts,
    model_fact,
    schedule_facts,
    whole_tokens,
)
from megatron_m1.training.preflight import (
    check_data,
    check_folders,
    find_embedded_corpus,
    newest_checkpoint,
    with_own_tokenizer,
)
from megatron_m1.training.run_folder import IMPORTED
from megatron_m1.training.stage_checks import check_epochs, check_later_stages

BYTES = {"fp32": 4, "bf16": 2}


def where_from(launch: Launch | None) -> str:
    """Say where the world size comes from."""
    if launch is None:
        return "torchrun"
    return f"{counted(launch.nodes, 'node')} x {launch.processes_per_node}"


def describe_plan(
    stages: Sequence[ResolvedConfig],
    world_size: int,
    *,
    at: Position,
    source: str,
    on_gpu: bool,
    columns: int | None,
) -> list[str]:
    """Check the files of a resolved configuration and describe the run, line by line.

    Args:
        stages: what is left of the run, resolved; the first one for ``world_size``.
        world_size: processes over all nodes.
        at: how far the run is.
        source: where the world size comes from, in words.
        on_gpu: whether the plan is for GPUs.
        columns: of the terminal; None lets lines have any length.

    Raises:
        ValueError: the run folder or the data are not as the configuration says.
    """
    check_folders(stages[0])
    notes: list[str] = []
    found = find_embedded_corpus(stages[0])
    config = with_own_tokenizer(found or stages[0], note=notes.append)
    if found:
        later = [with_own_tokenizer(find_embedded_corpus(stage) or stage, note=lambda _: None) for stage in stages[1:]]
        data_lines = _data_lines([config, *later], notes)
    else:
        data_lines = _lines_of_what_is_built(config)
    model, parallel, train = config.model, config.parallel, config.train
    device = "gpu" if on_gpu else "cpu"
    return [
        f"plan        preset {config.preset}, {train.precision} on {device} over {parallel.distributed_backend}, "
        f"{model.transformer_impl} modules",
        f"world       {counted(world_size, 'process', 'processes')} ({source})",
        *lines_of([*mesh_facts(parallel, world_size), model_fact(config)]),
        *_stage_lines(config),
        *data_lines,
        *lines_of([*batch_facts(config, world_size, schedules_at(config.recipe, at), tokens=at.tokens)]),
        *lines_of(_start_facts(config, at)),
        *(stage_table(stages, world_size, course(config.recipe, at), columns) if config.stages else []),
        "dry run: nothing was started",
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


def _lines_of_what_is_built(config: ResolvedConfig) -> list[str]:
    data = config.data
    notes = vocabulary_notes(data.embedded_corpus, data.tokenizer, config.model.vocab_size)
    return [f"data        embedded corpus, to be built in {data.embedded_corpus}", *notes]


def _data_lines(stages: Sequence[ResolvedConfig], notes: Sequence[str]) -> list[str]:
    config = stages[0]
    summary = check_data(config, only_plan=True)
    later = check_later_stages(stages, only_plan=True)
    check_epochs(config)
    return [
        f"tokenizer   {config.data.tokenizer}, {summary.tokenizer_vocab_size:,} tokens",
        *lines_of(blend_facts("train", config.data.train, summary.train, tokens=whole_tokens(config))),
        *lines_of(blend_facts("validation", config.data.validation, summary.validation)),
        *notes,
        *summary.notes,
        *later,
    ]


def _initial_source(config: ResolvedConfig, init_from: str) -> str:
    """What a new run will read its weights from."""
    if not init_from.startswith(HUGGING_FACE):
        return f"weights of {find_checkpoint(Path(init_from))}"
    imported = Path(config.run.folder) / IMPORTED
    if complete_checkpoints(imported):
        return f"weights of {init_from}, as they lie converted in {imported}"
    return f"weights of {init_from}, which is converted to {imported} first"


def _start_facts(config: ResolvedConfig, at: Position) -> list[Fact]:
    """Where the run begins: at a checkpoint, and what has changed since; or with which weights."""
    run, spans = config.run, course(config.recipe, at)
    newest = newest_checkpoint(config)
    if newest is None:
        weights = [("init_from", _initial_source(config, run.init_from))] if run.init_from is not None else []
        return [*schedule_facts(config, spans), ("run folder", run.folder), *weights]
    facts = [("run folder", f"{run.folder}, goes on from {newest.name}")]
    if run.init_from is not None:
        facts.append(("init_from", f"{run.init_from} is not read: the run has checkpoints"))
    step = step_of(newest)
    if not spans:
        return [*facts, ("", nothing_to_train(step, config))]
    try:
        changes = changes_since(newest, config)
    except ValueError as error:
        return [*facts, ("", f"{error}: it will be passed over")]
    facts += [("changed" if not at else "", change) for at, change in enumerate(changes.values())]
    schedules = spans[0].schedules
    if schedules.index and schedules.starts[schedules.stage.name] == at.tokens:
        facts.append(("", f"stage {schedules.stage.name} begins there"))
    else:
        facts += [("", line) for line in stream_lines(changes)]
    return [*schedule_facts(config, spans), *facts]
