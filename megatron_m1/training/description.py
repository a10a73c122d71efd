"""A run in a few facts, each a label and a text: for the plan of a dry run, and for the beginning of a log."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import batched
from pathlib import Path

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.lr import parse_segments
from megatron_m1.config.resolve import data_parallel_size
from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.config.schedules import Schedules, Span, course
from megatron_m1.config.stages import BATCH, LR
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import PrefixSummary
from megatron_m1.plan.parameters import model_counts
from megatron_m1.printing import counted

type Fact = tuple[str, str]

LABEL_WIDTH = 12
LINE_WIDTH = 80
MANY_PASSES = 4.0
"""As often as tokens may be read before they teach markedly less than new ones do (Muennighoff et al., 2023)."""
_SHOWN_CORPORA = 6


def lines_of(facts: Iterable[Fact], *, width: int | None = None) -> list[str]:
    """Lay facts out, labels in a column of their own.

    Args:
        facts: labels and texts.
        width: of a line. Longer texts go on below themselves after a comma or colon; what has none stays whole. None
            for any length.
    """
    lines = []
    for label, text in facts:
        parts = [text]
        if width is not None:
            clauses = re.sub(r"(?<![,:]) ", "\0", text)
            wrapped = textwrap.wrap(clauses, width - LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)
            parts = [part.replace("\0", " ") for part in wrapped]
        lines += [f"{label if not at else '':<{LABEL_WIDTH}}{part}" for at, part in enumerate(parts)]
    return lines


def mesh_facts(parallel: ResolvedParallelConfig, world_size: int) -> list[Fact]:
    """Both grids, of the dense layers and of the experts."""
    expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    replicas = data_parallel_size(parallel, world_size)
    expert_replicas = world_size // (pipeline * expert * expert_tensor)
    return [
        (
            "mesh",
            f"tensor {parallel.tensor_model_parallel_size} x context {parallel.context_parallel_size} "
            f"x pipeline {pipeline} x data {replicas} = {world_size}",
        ),
        (
            "experts",
            f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline} "
            f"x expert data {expert_replicas} = {world_size}",
        ),
    ]


def model_fact(config: ResolvedConfig) -> Fact:
    """Layers and parameters."""
    counts, active = model_counts(config.model), model_counts(config.model, active=True)
    return "model", (
        f"{counted(config.model.num_layers, 'layer')}, {counts.total:,} parameters, {active.total:,} active per token"
    )


def blend_facts(
    name: str, blend: Sequence[str], summaries: Sequence[PrefixSummary], *, tokens: int | None = None
) -> list[Fact]:
    """One fact a corpus; with the ``tokens`` of the whole run, how often each is read."""
    if not blend:
        return [(name, "none")]
    _, weights = parse_blend(blend)
    return [
        (
            name,
            f"{weight:.1%} {summary.prefix}: {counted(summary.documents, 'document')}, "
            f"{counted(summary.tokens, 'token')}"
            + (f", read {weight * tokens / summary.tokens:,.2f} times" if tokens else ""),
        )
        for weight, summary in zip(weights, summaries, strict=True)
    ]


def corpora_facts(config: ResolvedConfig, summaries: Sequence[PrefixSummary], tokens: int) -> list[Fact]:
    """Training corpora for a narrow screen: the ends of their paths, and not too many of them.

    Args:
        config: of the run, or of a stage.
        summaries: of its corpora.
        tokens: of all of it.
    """
    _, weights = parse_blend(config.data.train)
    texts = [
        f"{weight:.1%} {_short(summary.prefix)}: {summary.tokens:,} tokens, "
        f"read {weight * tokens / summary.tokens:,.2f} times"
        for weight, summary in zip(weights, summaries, strict=True)
    ]
    left = summaries[_SHOWN_CORPORA:]
    if left:
        texts[_SHOWN_CORPORA:] = [f"and {len(left)} more: {sum(summary.tokens for summary in left):,} tokens"]
    return [("data" if not at else "", text) for at, text in enumerate(texts)]


def _short(path: str) -> str:
    parts = Path(path).parts
    return path if len(parts) <= 2 else os.path.join("...", *parts[-2:])


def repetition_notes(config: ResolvedConfig, summaries: Sequence[PrefixSummary]) -> list[str]:
    """A warning for every training corpus that the run, or the stage, reads more often than ``MANY_PASSES``."""
    _, weights = parse_blend(config.data.train)
    tokens = whole_tokens(config)
    read = [weight * tokens / summary.tokens for weight, summary in zip(weights, summaries, strict=True)]
    where = f"stage {config.stages[config.stage].name}" if config.stages else "the run"
    return [
        f"warning: {summary.prefix} is read {times:,.1f} times in {where}: beyond about {MANY_PASSES:.0f}, tokens that "
        "come again teach little; take more data, another blend or fewer steps"
        for times, summary in zip(read, summaries, strict=True)
        if times > MANY_PASSES
    ]


def whole_tokens(config: ResolvedConfig) -> int:
    """Return the tokens of a stage as it is planned, or of the whole run of one without stages."""
    if config.stages:
        return config.stages[config.stage].tokens
    return course(config.recipe)[-1].end


def batch_facts(config: ResolvedConfig, world_size: int, schedules: Schedules, *, tokens: int = 0) -> list[Fact]:
    """Packs and tokens of a step, and what a pack is where it is cut or padded.

    Args:
        config: of the stage.
        world_size: processes.
        schedules: of the stage.
        tokens: of the run, where it goes on.
    """
    data, packs = config.data, schedules.packs(tokens)
    replicas = data_parallel_size(config.parallel, world_size)
    batch = (
        f"{counted(packs, 'pack')} of {data.seq_length:,} tokens = {packs * data.seq_length:,} tokens a step, "
        f"{counted(packs // replicas, 'micro-batch', 'micro-batches')} a rank"
    )
    facts = [("batch", batch), *_ramp_facts(schedules, tokens)]
    context, padded = config.parallel.context_parallel_size, config.padded_pack_tokens
    padding = padded - data.seq_length
    if context == 1 and not padding:
        return facts
    added = f", {padding} of them padding at its end" if padding else ""
    return [*facts, ("packs", f"{padded:,} tokens each{added}, {padded // context:,} on every context rank")]


def _ramp_facts(schedules: Schedules, tokens: int) -> list[Fact]:
    """Batches to come."""
    origin = schedules.origin(BATCH)
    points = batched(schedules.stage.config.train.global_batch_size_schedule, 2)
    later = [
        f"{packs:,.0f} from {origin + int(start):,} tokens on" for start, packs in points if origin + start > tokens
    ]
    return [("", ", ".join(later))] if later else []


def schedule_facts(config: ResolvedConfig, spans: Sequence[Span]) -> list[Fact]:
    """Stage, steps and learning rate, and whether the run goes on after the end of the schedule.

    Args:
        config: of the stage in which the run goes on.
        spans: what is left of the run, that stage first.
    """
    span, listed = spans[0], config.recipe.stages
    first, last = f"{span.first_step:,} to " if span.first_step > 1 else "", span.last_step
    facts: list[Fact] = []
    if listed:
        place = f"{span.stage.name}, {span.stage.index + 1} of {len(listed)}"
        facts.append(("stage", f"{place}, to step {last:,} = {span.end:,} tokens"))
        last = spans[-1].last_step
    facts.append(("steps", f"{first}{last:,} = {spans[-1].end:,} tokens"))
    facts.append(("lr", ", ".join(_rate_texts(span.schedules))))
    optimizer, schedules = span.stage.config.optimizer, span.schedules
    end = schedules.origin(LR) + schedules.warmup_tokens + optimizer.lr_constant_tokens + optimizer.lr_decay_tokens
    if optimizer.lr_decay_tokens and span.end > end:
        _, reached = schedules.advance(span.tokens, span.first_step - 1, end=end + 1)
        facts.append(
            ("", f"min_lr from step {max(reached, span.first_step):,} on: the schedule ends at {end:,} tokens")
        )
    return facts


def _rate_texts(schedules: Schedules) -> list[str]:
    optimizer = schedules.stage.config.optimizer
    texts = [f"peak {optimizer.lr:g}"]
    if optimizer.lr_warmup_steps:
        texts.append(f"{counted(optimizer.lr_warmup_steps, 'step')} of warm-up")
    if optimizer.lr_warmup_tokens:
        texts.append(f"{optimizer.lr_warmup_tokens:,} tokens of warm-up")
    if optimizer.lr_constant_tokens:
        texts.append(f"{optimizer.lr_constant_tokens:,} at the peak")
    if optimizer.lr_decay_tokens:
        texts.append(f"{optimizer.lr_decay_style} decay over {optimizer.lr_decay_tokens:,} to {optimizer.min_lr:g}")
    for segment in parse_segments(optimizer.lr_segments):
        way = f"{segment.end:g}" if segment.shape == "constant" else f"{segment.shape} to {segment.end:g}"
        texts.append(f"{way} over {segment.tokens:,}")
    return texts
