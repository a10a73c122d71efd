"""The stages of a run as a table: what each one trains with, and on which mesh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_m1.config import ParallelConfig, ResolvedConfig
from megatron_m1.config.resolve import fitting_world
from megatron_m1.config.schedules import Span
from megatron_m1.printing import counted, table

HEADING = ("stage", "tokens", "steps", "length", "packs a step", "lr", "mesh", "blend")


def stage_table(
    stages: Sequence[ResolvedConfig], world_size: int, spans: Sequence[Span], columns: int | None
) -> list[str]:
    """Lay out what is left of a run.

    Args:
        stages: resolved, the present one first.
        world_size: processes that it is planned for.
        spans: the same stages with their steps.
        columns: of the terminal; None for any length.
    """
    by_index = {config.stage: config for config in stages}
    rows = [_row(span, by_index[span.stage.index], world_size) for span in spans]
    return table([HEADING, *rows], columns, left=(0, 5, 6, 7))


def _row(span: Span, config: ResolvedConfig, world_size: int) -> tuple[str, ...]:
    schedules = span.schedules
    first, last = schedules.packs(span.tokens), schedules.packs(span.end - 1)
    rates = [f"{schedules.learning_rate(tokens):g}" for tokens in (span.tokens, span.end)]
    return (
        span.stage.name,
        f"{span.end - span.tokens:,}",
        f"{span.first_step:,}-{span.last_step:,}",
        f"{config.data.seq_length:,}",
        f"{first:,}" if first == last else f"{first:,} to {last:,}",
        rates[0] if rates[0] == rates[1] else " to ".join(rates),
        _mesh(config.parallel, fitting_world(world_size, config.parallel)),
        _blend(config.data.train),
    )


def _mesh(parallel: ParallelConfig, processes: int) -> str:
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "ep": parallel.expert_model_parallel_size,
    }
    said = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    return f"{said or 'dp'} on {counted(processes, 'process', 'processes')}"


def _blend(blend: Sequence[str]) -> str:
    """Names of the corpora without their folders, with weights where these are given."""
    if not blend:
        return "embedded corpus"
    try:
        weights = [float(item) for item in blend[::2]]
    except ValueError:
        return ", ".join(Path(prefix).name for prefix in blend)
    total = sum(weights)
    names = (Path(prefix).name for prefix in blend[1::2])
    return ", ".join(f"{weight / total:.0%} {name}" for weight, name in zip(weights, names, strict=True))
