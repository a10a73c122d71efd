"""What happened to a run besides its steps: checkpoints, starts, and the configuration as it was and as it became."""

from __future__ import annotations

import functools
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.checkpoint.folder import step_of
from megatron_m1.config.fields import STAGES
from megatron_m1.config.written import CONFIG, RESOLVED, STARTS
from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.files import regular

EVENT_FILES = "tensorboard/events.out.tfevents.*"
"""One for each start of a run, whose second event says after which step it goes on."""
_LARGEST_EVENT = 1 << 16
"""Of the two first events of a file: bytes."""


@dataclass(frozen=True)
class Start:
    """Processes that began to train the run, or a stage of it."""

    step: int
    """Last step that they found done; 0 for a new run."""
    when: float | None
    """Seconds since 1970; None where only the records tell of it."""
    stage: str | None = None
    """Name of the stage that they began or went on with, if that is known."""
    same_processes: bool = False
    """They had trained the stage before, so that it was no restart."""
    settings: dict[str, Any] | None = None
    """How the run was configured then, by dotted path; None where that is not recorded."""


@dataclass(frozen=True)
class Change:
    """A field that has another value from some start on."""

    path: str
    before: Any
    after: Any
    first: int
    """Step of the last checkpoint that has ``before``."""
    last: int | None
    """Step of the first checkpoint that has ``after``; None if only the run itself has it."""
    start: Start | None = None
    """With which it came, where starts are recorded."""


@dataclass(frozen=True)
class History:
    """Of one run."""

    checkpoints: list[int]
    """Steps of those that are there, ascending."""
    starts: list[Start]
    """In order of time."""
    settings: dict[str, Any]
    """The configuration now, by dotted path, with what was derived; empty if there is none."""
    changes: list[Change]

    @property
    def restarts(self) -> list[Start]:
        """All starts but the first, and those of stages that the same processes went on with."""
        return [start for start in self.starts[1:] if not start.same_processes]

    @property
    def knows_starts(self) -> bool:
        """Whether the run has recorded them, so that there are no others."""
        return any(start.settings is not None for start in self.starts)

    def stage_name(self, number: int, step: int) -> str:
        """Return the name of a stage.

        Args:
            number: of the stage, from 1.
            step: one that was trained in it. Stages may have been cut otherwise since.
        """
        then = [start.settings for start in self.starts if start.settings is not None and start.step < step]
        stages = (then[-1] if then else self.settings).get(STAGES)
        entry = stages[number - 1] if isinstance(stages, list) and 1 <= number <= len(stages) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        return name if isinstance(name, str) else f"stage {number}"


NO_HISTORY = History([], [], {}, [])


def read_history(folder: Path) -> History:
    """Read the history of a run from its folder. What is missing or can't be read is left out."""
    checkpoints = complete_checkpoints(folder)[::-1]
    parse = functools.lru_cache(maxsize=2)(_parsed)
    kept = [(step_of(place), _settings(place, parse)) for place in checkpoints]
    settings = _settings(folder, parse)
    starts = _starts(folder)
    return History(
        checkpoints=[step for step, _ in kept],
        starts=starts,
        settings=settings,
        changes=list(_changes([(step, found) for step, found in kept if found], starts, settings)),
    )


def _settings(place: Path, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    for name in (RESOLVED, CONFIG):
        with suppress(OSError, ValueError):
            # Hundreds of checkpoints in a row have the same text, and YAML is slow.
            if found := parse(regular(place / name).read_text(encoding="utf-8")):
                return found
    return {}


def _parsed(text: str) -> dict[str, Any]:
    # Not load_config: a run of another version has other fields, and is worth a look all the same.
    content = parse_yaml(text)
    return dict(_flat(content, "")) if isinstance(content, dict) else {}


def _flat(content: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _changes(kept: list[tuple[int, dict[str, Any]]], starts: list[Start], now: dict[str, Any]) -> Iterator[Change]:
    recorded = [start for start in starts if start.settings is not None]
    states: list[tuple[int | None, dict[str, Any], Start | None]] = [
        # Of what an older version has trained there are only checkpoints.
        *((step, found, None) for step, found in kept if not recorded or step <= recorded[0].step),
        *((start.step, start.settings or {}, start) for start in recorded),
    ]
    if now and not recorded:
        states.append((None, now, None))
    for (first, before, _), (last, after, start) in itertools.pairwise(states):
        assert first is not None
        for path in dict.fromkeys([*before, *after]):
            if before.get(path) != after.get(path):
                yield Change(path, before.get(path), after.get(path), first, last, start)


def _starts(folder: Path) -> list[Start]:
    recorded = _recorded_starts(folder / STARTS)
    if recorded and recorded[0].step == 0:
        return recorded
    found = []
    for path in folder.glob(EVENT_FILES):
        with suppress(OSError, ValueError):
            found.append(_start(regular(path)))
    found.sort(key=lambda start: start.when or 0.0)
    if not recorded:
        return found
    # An older version has begun the run.
    earlier = [start for start in found if start.when and recorded[0].when and start.when < recorded[0].when]
    # The event file of a start is made just before its line.
    if earlier and earlier[-1].step == recorded[0].step:
        earlier.pop()
    return [*earlier, *recorded]


def _recorded_starts(path: Path) -> list[Start]:
    """Read a starts.jsonl: lines that are none, such as half of one, are left out."""
    try:
        lines = regular(path).read_bytes().splitlines()
    except OSError:
        return []
    return [start for line in lines if (start := _recorded_start(line)) is not None]


def _recorded_start(line: bytes) -> Start | None:
    try:
        record = json.loads(line)
        step, when = record["step"], datetime.fromisoformat(record["time"]).timestamp()
        settings, stage = dict(_flat(record["config"], "")), record.get("stage")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError, RecursionError):
        return None
    if type(step) is not int or not 0 <= step < 1 << 53:
        return None
    same_processes = record.get("same_processes") is True
    return Start(step, when, stage if isinstance(stage, str) else None, same_processes, settings)


def _start(path: Path) -> Start:
    """Read the step at which an event file begins, and when.

    Raises:
        ValueError: it has no such event.
    """
    # Imported here: nobody needs protobuf to be told that a path is wrong.
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    with path.open("rb") as file:
        for _ in range(2):
            head = file.read(12)
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else _LARGEST_EVENT + 1
            if size > _LARGEST_EVENT:
                break
            try:
                event = Event.FromString(file.read(size))
            except DecodeError as error:
                raise ValueError(f"{path} is no file of events") from error
            file.read(4)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                return Start(max(event.step - 1, 0), event.wall_time)
    raise ValueError(f"{path} has no start")
