"""What happened at single steps of runs: stages that began, restarts, checkpoints, steps that were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from megatron_m1.report.runs import Run

STAGE, RESTART, CHECKPOINT, SKIPPED = "stage", "restart", "checkpoint", "skipped"
KINDS = (SKIPPED, CHECKPOINT, RESTART, STAGE)
"""From the bottom to the top."""
MOST_MARKS = 500
"""Of a kind and run, drawn: more could not be told apart."""


@dataclass(frozen=True)
class Mark:
    """Something at one step of one run."""

    run: int
    """Its number among the runs of the page."""
    kind: str
    step: int
    text: str
    is_kept: bool = True
    """Of a checkpoint: it is still there."""


def marks_of(runs: Sequence[Run]) -> list[Mark]:
    """Collect the marks of runs, each kind by step and thinned out where there are too many."""
    marks = []
    for number, run in enumerate(runs):
        kept = set(run.history.checkpoints)
        written = [int(step) for step in run.records.saves.extremes(MOST_MARKS)[0]]
        skipped = [int(step) for step in run.records.skipped.extremes(MOST_MARKS)[0]]
        found = [
            [Mark(number, STAGE, step, name) for step, name in run.stages],
            [Mark(number, RESTART, start.step, restart_text(start.when)) for start in run.restarts],
            [Mark(number, CHECKPOINT, step, "removed since", False) for step in written if step not in kept],
            [Mark(number, CHECKPOINT, step, "kept") for step in run.history.checkpoints],
            [Mark(number, SKIPPED, step, "nothing was changed") for step in skipped],
        ]
        for of_kind in found:
            marks += of_kind[:: -(-len(of_kind) // MOST_MARKS) or 1]
    return marks


def restart_text(when: float | None) -> str:
    """Tell when a restart was, in this machine's time."""
    if when is None:
        return "at a time that is not recorded"
    try:
        return datetime.fromtimestamp(when).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return "at a time that can't be told"
