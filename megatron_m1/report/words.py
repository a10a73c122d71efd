"""What a page says in words and tables, from plain values that its template lays out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_m1.printing import counted, shown
from megatron_m1.report.history import Change, Start
from megatron_m1.report.marks import restart_text
from megatron_m1.report.runs import Run

type Fact = tuple[str, str]
MOST_RESTARTS = 50
MOST_CHANGES = 500
"""That are spelt out."""


@dataclass(frozen=True)
class Told:
    """One run in words."""

    name: str
    facts: list[Fact]
    stages: list[Fact]
    restarts: list[str]
    changes: list[tuple[str, str, str, str]]
    """Field, before, after, when."""
    settings: list[Fact]


def told(run: Run) -> Told:
    """Tell what is known of a run."""
    records, history = run.records, run.history
    stages = [*run.stages, (records.last_step + 1, "")]
    return Told(
        name=run.name,
        facts=_facts(run),
        stages=[
            (name, f"steps {max(first, 1):,} to {after - 1:,}")
            for (first, name), (after, _) in itertools.pairwise(stages)
        ],
        restarts=[f"after step {start.step:,}, {restart_text(start.when)}" for start in run.restarts[-MOST_RESTARTS:]],
        changes=[_change(change, history.restarts) for change in history.changes[-MOST_CHANGES:]],
        settings=[(path, value_text(value)) for path, value in history.settings.items()],
    )


def _facts(run: Run) -> list[Fact]:
    records, history = run.records, run.history
    facts = [("steps", f"{records.last_step:,}")]
    if records.tokens is not None:
        facts.append(("tokens", f"{records.tokens:,}"))
    for name, label in (("loss", "last loss"), ("validation_loss", "last validation loss")):
        series = records.figures.get(name)
        if series is not None and series.last is not None:
            facts.append((label, f"{series.last[1]:.4f} (step {series.last[0]:,})"))
    skipped = records.skipped.total()
    facts.append(("skipped steps", f"{skipped:,}"))
    facts.append(("restarts", f"{len(run.restarts):,}"))
    kept, written = len(history.checkpoints), records.saves.total()
    facts.append(("checkpoints", f"{kept:,} kept" + (f", {written:,} written" if written > kept else "")))
    if records.unreadable:
        facts.append(("not read", counted(records.unreadable, "line that is no record", "lines that are no records")))
    if records.left_out:
        facts.append(("left out", counted(records.left_out, "value of too many figures", "values of too many figures")))
    return facts


def _change(change: Change, restarts: Sequence[Start]) -> tuple[str, str, str, str]:
    if change.start is not None:
        return change.path, value_text(change.before), value_text(change.after), _start_text(change.start)
    within = [s for s in restarts if change.first <= s.step and (change.last is None or s.step < change.last)]
    if len(within) == 1:
        when = f"restart after step {within[0].step:,}"
    elif change.last is None:
        when = f"after step {change.first:,}"
    else:
        when = f"after step {change.first:,}, by {change.last:,}"
    return change.path, value_text(change.before), value_text(change.after), when


def _start_text(start: Start) -> str:
    what = f"stage {start.stage}" if start.same_processes and start.stage is not None else "restart"
    return f"{what} after step {start.step:,}"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the fields that runs have otherwise, with the value of each run."""
    paths = dict.fromkeys(path for run in runs for path in run.history.settings)
    rows = []
    for path in paths:
        values = [value_text(run.history.settings.get(path)) for run in runs]
        if len(set(values)) > 1:
            rows.append((path, values))
    return rows


def value_text(value: Any) -> str:
    """Spell a setting, not at any length."""
    return value if isinstance(value, str) and 0 < len(value) <= 200 else shown(value)
