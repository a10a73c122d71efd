"""The record of a run: metrics.jsonl, starts.jsonl, TensorBoard, Weights & Biases and the console."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from megatron_m1.config.tree import RunConfig
from megatron_m1.config.written import STARTS
from megatron_m1.files import refusal, write_atomically
from megatron_m1.training.figures import Record, alarms, shown
from megatron_m1.training.record_file import RecordFile
from megatron_m1.training.tracking import Tracker

if TYPE_CHECKING:
    from megatron_m1.training.event_file import EventFile


BAR_COLUMNS = (10, 20)
"""Of the live line's bar, on terminals below and from 80 columns."""


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, above the console's live status line if there is one."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class MetricsLog:
    """Writes every step's record. Construct it on one rank only, and use it as a context manager.

    A disk that refuses does not end the run: records are kept in memory and tried again with the next one.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        *,
        start_step: int,
        total_steps: int,
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        """Open all sinks; records after ``start_step`` that an earlier, interrupted run left are dropped.

        Args:
            folder: the run's folder; made if missing.
            run: whether events go to ``<folder>/tensorboard`` and figures to Weights & Biases, and the steps between
                console lines.
            start_step: last step that the run's checkpoint holds, 0 for a new run.
            total_steps: steps of the whole run, for progress and remaining time.
            settings: the configuration as nested dictionaries, for Weights & Biases.
            console: where lines go; standard output by default. On a terminal, a live status line stands below them.

        Raises:
            OSError: the files can't be made.
            ValueError: ``run.log_interval`` below 1, or W&B refuses.
        """
        if run.log_interval < 1:
            raise ValueError(f"run.log_interval is {run.log_interval}; it must be 1 or more")
        folder.mkdir(parents=True, exist_ok=True)
        self._log_interval = run.log_interval
        self._total_steps = total_steps
        self._start_step = start_step
        self._started = time.monotonic()
        self._open = ExitStack()
        self._console = Console() if console is None else console
        self._starts: RecordFile | None = None
        self._path = folder / "metrics.jsonl"
        rewind(self._path, start_step)
        self._file = RecordFile(self._path, self.note)
        self._open.callback(self._file.close)
        self._tensorboard = _event_file(folder, start_step, self.note) if run.tensorboard else None
        if self._tensorboard is not None:
            self._open.callback(self._tensorboard.close)
        self._tracker = Tracker(folder, run, settings or {}) if run.wandb_project is not None else None
        if self._tracker is not None:
            self._open.callback(self._tracker.close)
        self._live = _status_line(self._console, start_step, total_steps) if self._console.is_terminal else None
        if self._live is not None:
            self._open.enter_context(self._live)
            # Whoever ends this process without warning leaves a terminal as it should be.
            self._console.show_cursor(True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def log_step(self, step: int, record: Record) -> None:
        """Write a training step's figures.

        In metrics.jsonl a number that is not finite becomes null, because JSON has no NaN. The console shows every
        ``log_interval``-th step, the last one, and each with a figure that alarms.
        """
        self._write(step, record)
        if step % self._log_interval == 0 or step == self._total_steps or alarms(record):
            # On a terminal the live line has the remaining time.
            self.note(self._line(step, record) + ("" if self._console.is_terminal else self._remaining(step)))
        if self._live is not None:
            text = shown(record, _live_room(self._console.width, self._total_steps))
            self._live.update(self._live.task_ids[0], completed=step, shown=text)
            self._live.columns = _live_columns(self._console.width)
            self._live.refresh()

    def log_validation(self, step: int, record: Record) -> None:
        """Write what was measured on held-out packs after ``step``."""
        self._write(step, record)
        self.note(self._line(step, record))

    def log_start(self, record: Mapping[str, Any]) -> None:
        """Append to starts.jsonl what begins to train: it is never rewound.

        Args:
            record: JSON-able, see ``starts.start_record``.

        Raises:
            OSError: the file can't be made.
        """
        path, torn = self._path.with_name(STARTS), b""
        if self._starts is None:
            # A start that was killed may have left half a line, which must not take this one with it.
            content = path.read_bytes() if path.exists() else b""
            torn = b"\n" if content and not content.endswith(b"\n") else b""
            self._starts = RecordFile(path, self.note)
            self._open.callback(self._starts.close)
        self._starts.write(torn + (json.dumps(record) + "\n").encode())

    def note(self, line: str) -> None:
        """Print a line of text on the console, above the live status line if there is one."""
        print_line(self._console, line)

    def go_back(self, step: int) -> None:
        """Drop the records after ``step``, which the run will come to once more. W&B draws over what it has.

        A disk that refuses is said: then some steps stand in a file twice.
        """
        # It opens again with the next record, and finds its end.
        self._file.close()
        try:
            rewind(self._path, step)
        except OSError as error:
            self.note(f"{self._path} keeps the records after step {step}: {refusal(error, self._path.parent)}")
        if self._tensorboard is not None:
            self._tensorboard.start_after(step)

    def _write(self, step: int, record: Record) -> None:
        if self._starts is not None:
            self._starts.try_again()
        values = {figure.name: value for figure, value in record.items()}
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self._file.write((json.dumps({"step": step, **finite}) + "\n").encode())
        scalars = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            self._tensorboard.add(step, scalars)
        if self._tracker is not None:
            self._tracker.add(step, record)

    def _line(self, step: int, record: Record) -> str:
        width = len(str(self._total_steps))
        head = f"step {step:>{width}}/{self._total_steps} | "
        room = self._console.width - len(head) if self._console.is_terminal else None
        return head + shown(record, room)

    def _remaining(self, step: int) -> str:
        done, left = step - self._start_step, self._total_steps - step
        if done <= 0 or left <= 0:
            return ""
        return f" | {_duration((time.monotonic() - self._started) / done * left)} left"


def rewind(path: Path, step: int) -> None:
    """Drop from a metrics.jsonl the records after ``step`` and any torn line. Atomic; a missing file is fine.

    Raises:
        OSError: the disk refuses. What comes last is cut off, which takes no room.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_whole(line, step))
    if content.startswith(kept):
        os.truncate(path, len(kept))
    else:
        write_atomically(path, kept)


def _is_whole(line: bytes, last_step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    step = record.get("step") if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(step, int) and step <= last_step


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _live_columns(columns: int) -> tuple[ProgressColumn, ...]:
    return (
        BarColumn(bar_width=BAR_COLUMNS[columns >= 80]),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )


def _live_room(columns: int, total_steps: int) -> int:
    """Columns that bar, steps, remaining time and what stands between them leave for figures.

    And the ``^C`` that a terminal writes behind them: it would take a full line to two, of which one would stay.
    """
    others = BAR_COLUMNS[columns >= 80] + (2 * len(str(total_steps)) + 1) + len("100:00:00") + len("^C")
    return columns - others - 4


def _status_line(console: Console, start_step: int, total_steps: int) -> Progress:
    progress = Progress(
        *_live_columns(console.width),
        console=console,
        auto_refresh=False,
        transient=True,
        # What goes to a file must not come out here.
        redirect_stderr=sys.stderr.isatty(),
    )
    progress.add_task("", total=total_steps, completed=start_step, shown="")
    return progress


def _event_file(folder: Path, start_step: int, note: Callable[[str], None]) -> EventFile:
    # Imported here: runs without TensorBoard have no use for it.
    from megatron_m1.training.event_file import EventFile

    return EventFile(folder / "tensorboard", start_step, note)
