"""A run as the report reads it: where it lies, what it is called, its records and its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.report.history import NO_HISTORY, History, Start, read_history
from megatron_m1.report.records import RunRecords

RECORDS = "metrics.jsonl"
MOST_RUNS = 10
"""On one page: so many colours can be told apart."""
_SHOWN_BYTES = 4 << 20
"""From so many bytes on, reading takes long enough for a progress bar."""


@dataclass
class Run:
    """One of the runs of a page."""

    folder: Path
    name: str
    """The folder's, with as much of what stands above it as tells the runs apart."""
    records: RunRecords
    history: History

    @property
    def stages(self) -> list[tuple[int, str]]:
        """First step and name of each stage, in order."""
        return [
            (step, self.history.stage_name(stage, step) if isinstance(stage, int) else stage)
            for step, stage in self.records.stages
        ]

    @property
    def restarts(self) -> list[Start]:
        """As the history has them, or else as the records show them."""
        if self.history.restarts or self.history.knows_starts:
            return self.history.restarts
        return [Start(step, None) for step in self.records.restarts]


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Find the runs; nothing is read yet.

    Raises:
        ValueError: a folder is no run's, comes twice, or there are too many; one line.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are too many for one page: give {MOST_RUNS} at most")
    seen: dict[Path, Path] = {}
    for folder in folders:
        _check(folder)
        same = seen.setdefault(folder.resolve(), folder)
        if same is not folder:
            raise ValueError(f"{folder} is the same run as {same}: name it once")
    names = _names(list(seen))
    return [
        Run(folder, name, RunRecords(folder / RECORDS), NO_HISTORY) for folder, name in zip(folders, names, strict=True)
    ]


def _check(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: give the folder of a run")
    if not (folder / RECORDS).exists():
        above = next((parent for parent in folder.resolve().parents if (parent / RECORDS).exists()), None)
        fix = f"did you mean {above}?" if above else "give the folder of a run (run.folder)"
        raise ValueError(f"{folder} has no {RECORDS}: {fix}")


def _names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(folders)


def read_runs(runs: Sequence[Run]) -> bool:
    """Read what is new of each run, with a progress bar on standard error if that takes long.

    Returns:
        Whether anything was new.

    Raises:
        ValueError: a file can't be read; one line.
    """
    size = sum(run.records.unread() for run in runs)
    console = Console(stderr=True)
    columns = (TextColumn("reading records"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or size < _SHOWN_BYTES
    is_new = False
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=size)
        for run in runs:
            if run.records.read(lambda read: bar.advance(task, read)) or run.history == NO_HISTORY:
                run.history = read_history(run.folder)
                is_new = True
    return is_new
