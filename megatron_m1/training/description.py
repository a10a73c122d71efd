"""A run in a few facts, each a label and a text: for the plan of a dry run, and for the beginning of a log."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.resolve import data_parallel_size
from megatron_m1.config.resolved import ResolvedParallelConfig
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


def run_tokens(config: ResolvedConfig) -> int:
    """Tokens of the whole run."""
    return config.train.max_steps * config.tokens_per_step


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


def corpora_facts(config: ResolvedConfig, summaries: Sequence[PrefixSummary]) -> list[Fact]:
    """Training corpora for a narrow screen: the ends of their paths, and not too many of them."""
    _, weights = parse_blend(config.data.train)
    texts = [
        f"{weight:.1%} {_short(summary.prefix)}: {summary.tokens:,} tokens, "
        f"read {weight * run_tokens(config) / summary.tokens:,.2f} times"
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
    """A warning for every training corpus that the run reads more often than ``MANY_PASSES``."""
    _, weights = parse_blend(config.data.train)
    read = [weight * run_tokens(config) / summary.tokens for weight, summary in zip(weights, summaries, strict=True)]
    return [
        f"warning: {summary.prefix} is read {times:,.1f} times in the run: beyond about {MANY_PASSES:.0f}, tokens that "
        "come again teach little; take more data, another blend or fewer steps"
        for times, summary in zip(read, summaries, strict=True)
        if times > MANY_PASSES
    ]


def batch_facts(config: ResolvedConfig, world_size: int) -> list[Fact]:
    """Packs and tokens of a step, and what a pack is where it is cut or padded."""
    train, data = config.train, config.data
    replicas = data_parallel_size(config.parallel, world_size)
    batch = (
        f"{counted(train.global_batch_size, 'pack')} of {data.seq_length:,} tokens = {config.tokens_per_step:,} tokens "
        "a step, "
        f"{counted(train.global_batch_size // replicas, 'micro-batch', 'micro-batches')} a rank"
    )
    context, tokens = config.parallel.context_parallel_size, config.padded_pack_tokens
    padding = tokens - data.seq_length
    if context == 1 and not padding:
        return [("batch", batch)]
    added = f", {padding} of them padding at its end" if padding else ""
    return [("batch", batch), ("packs", f"{tokens:,} tokens each{added}, {tokens // context:,} on every context rank")]


def schedule_facts(config: ResolvedConfig, *, step: int = 0, tokens: int = 0) -> list[Fact]:
    """Steps and learning rate, and whether the run goes on after the end of the schedule.

    Args:
        config: of the run.
        step: where it goes on.
        tokens: trained on until then.
    """
    optimizer, left = config.optimizer, config.train.max_steps - step
    last = tokens + left * config.tokens_per_step
    lr = [f"peak {optimizer.lr:g}"]
    if optimizer.lr_warmup_tokens:
        lr.append(f"{optimizer.lr_warmup_tokens:,} tokens of warm-up")
    if optimizer.lr_constant_tokens:
        lr.append(f"{optimizer.lr_constant_tokens:,} at the peak")
    if optimizer.lr_decay_tokens:
        lr.append(f"{optimizer.lr_decay_style} decay over {optimizer.lr_decay_tokens:,} to {optimizer.min_lr:g}")
    facts = [
        ("steps", f"{f'{step + 1:,} to ' if step else ''}{config.train.max_steps:,} = {last:,} tokens"),
        ("lr", ", ".join(lr)),
    ]
    end = optimizer.lr_warmup_tokens + optimizer.lr_constant_tokens + optimizer.lr_decay_tokens
    if optimizer.lr_decay_tokens and last > end:
        first = step + max(0, end - tokens) // config.tokens_per_step + 1
        facts.append(("", f"min_lr from step {first:,} on: the schedule ends at {end:,} tokens"))
    return facts
