"""What a run's metrics.jsonl says, read once from the beginning to the end, and later from there on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_m1.files import regular
from megatron_m1.report.series import Series

STAGE = "stage"
"""Key of a record's stage: its number from 1, or a name. A run without one is one stage."""
SKIPPED, SAVED = "skipped_steps", "save_seconds"
PEAK = "memory_peak_gib"
"""Since the start of the process: it never falls but by a restart."""
COUNTS = {"step", STAGE, "tokens", "skipped_steps", "memory_peak_rank"}
"""Counts and names, which are told in words or as marks."""
MOST_FIGURES = 512
"""That are kept of one run; each takes a quarter of a megabyte."""
MOST_EVENTS = 1000
"""Stages and restarts that are kept of one run."""
LONGEST_LINE = 1 << 20
_BATCH = 8192
_OVERLAP = 256
"""Bytes before the place of reading, by which a file is known again."""


class RunRecords:
    """The records of one run, in memory that does not grow with their number.

    Args:
        path: its metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.figures: dict[str, Series] = {}
        """By name, in the order in which they came."""
        self.stages: list[tuple[int, int | str]] = []
        """First step of each stage and what the records call it, in order."""
        self.restarts: list[int] = []
        """Last steps before which the process was another one, as far as the records themselves show it."""
        self.skipped, self.saves = Series(), Series()
        """Steps that changed nothing; steps after which a checkpoint was written, with the seconds that it took."""
        self.last_step = 0
        self.tokens: int | None = None
        self.unreadable = 0
        """Lines that are no record."""
        self.left_out = 0
        """Values of figures beyond the most that are kept."""
        self._skipped_total = 0.0
        self._peak = 0.0
        self._offset = 0
        self._tail = b""
        self._waiting: dict[str, tuple[list[int], list[float]]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was found that can be drawn."""
        return not self.figures.keys() - COUNTS

    def unread(self) -> int:
        """Return the bytes that the file has beyond what was read.

        Raises:
            ValueError: it can't be looked at; one line.
        """
        try:
            return max(0, regular(self.path).stat().st_size - self._offset)
        except OSError as error:
            raise ValueError(f"{self.path} can't be read: {error.strerror or error}") from error

    def read(self, advance: Callable[[int], None] = lambda size: None) -> bool:
        """Read the records that are new; a file that was cut back or replaced is read again from the beginning.

        A line without its end is left for the next time.

        Args:
            advance: called with numbers of bytes that were read.

        Returns:
            Whether anything was new.

        Raises:
            ValueError: the file can't be read; one line.
        """
        try:
            with regular(self.path).open("rb") as file:
                was = self._offset
                if not self._is_continued(file):
                    self._clear()
                self._read_on(file, advance)
        except OSError as error:
            raise ValueError(f"{self.path} can't be read: {error.strerror or error}") from error
        return self._offset != was

    def _is_continued(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _read_on(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        file.seek(self._offset)
        lines = size = 0
        while (line := file.readline(LONGEST_LINE)).endswith(b"\n") or len(line) == LONGEST_LINE:
            self._offset += len(line)
            self._tail = (self._tail + line[-_OVERLAP:])[-_OVERLAP:]
            self._take(line)
            lines, size = lines + 1, size + len(line)
            if lines % _BATCH == 0:
                self._pass_on()
                advance(size)
                size = 0
        self._pass_on()
        advance(size)

    def _take(self, line: bytes) -> None:
        record = _record(line)
        if record is None:
            self.unreadable += 1
            return
        step = record.pop("step")
        values = dict(_numbers(record))
        if "tokens" in values or "loss" in record:
            self._take_events(step, record, values)
        for name, value in values.items():
            if name not in self._waiting and len(self._waiting) >= MOST_FIGURES:
                self.left_out += 1
                continue
            steps, kept = self._waiting.setdefault(name, ([], []))
            steps.append(step)
            kept.append(value)

    def _take_events(self, step: int, record: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Of a training step: whether something began, went wrong or was saved."""
        peak, skipped = values.get(PEAK, self._peak), values.get(SKIPPED, 0.0)
        if (self.last_step and step <= self.last_step) or peak < self._peak:
            self._note(self.restarts, min(self.last_step, step - 1))
        if skipped > self._skipped_total:
            self._add(self.skipped, step, 1.0)
        if values.get(SAVED):
            self._add(self.saves, step - 1, values[SAVED])
        stage = record.get(STAGE)
        if isinstance(stage, int | str) and (not self.stages or self.stages[-1][1] != stage):
            self._note(self.stages, (step, stage))
        self._peak, self._skipped_total = peak, skipped
        self.last_step = step
        if "tokens" in values:
            self.tokens = int(values["tokens"])

    def _note[T](self, events: list[T], event: T) -> None:
        if len(events) < MOST_EVENTS:
            events.append(event)

    def _add(self, series: Series, step: int, value: float) -> None:
        series.add(np.array([step]), np.array([value]))

    def _pass_on(self) -> None:
        for name, (steps, values) in self._waiting.items():
            self.figures.setdefault(name, Series()).add(np.array(steps, np.int64), np.array(values))
            steps.clear()
            values.clear()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 1 << 53 else None


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Finite numbers of a record by name; those of a group within it as ``group/name``."""
    found = []
    for name, value in record.items():
        if isinstance(value, dict) and not prefix:
            found += _numbers(value, f"{name}/")
        elif type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value):
            found.append((prefix + name, float(value)))
    return found
