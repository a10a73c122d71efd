"""What happened to a run besides its steps: checkpoints, starts, and the configuration as it was and as it became."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.checkpoint.folder import step_of
from megatron_m1.config.written import CONFIG, RESOLVED
from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.files import regular

EVENT_FILES = "tensorboard/events.out.tfevents.*"
"""One for each start of a run, whose second event says after which step it goes on."""
_LARGEST_EVENT = 1 << 16
"""Of the two first events of a file: bytes."""


@dataclass(frozen=True)
class Start:
    """A process that began to train the run."""

    step: int
    """Last step that it found done; 0 for a new run."""
    when: float | None
    """Seconds since 1970; None where only the records tell of it."""


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
        """All starts but the first."""
        return self.starts[1:]


NO_HISTORY = History([], [], {}, [])


def read_history(folder: Path) -> History:
    """Read the history of a run from its folder. What is missing or can't be read is left out."""
    checkpoints = complete_checkpoints(folder)[::-1]
    parse = functools.lru_cache(maxsize=2)(_parsed)
    kept = [(step_of(place), _settings(place, parse)) for place in checkpoints]
    settings = _settings(folder, parse)
    return History(
        checkpoints=[step for step, _ in kept],
        starts=_starts(folder),
        settings=settings,
        changes=list(_changes([(step, found) for step, found in kept if found], settings)),
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


def _changes(kept: list[tuple[int, dict[str, Any]]], now: dict[str, Any]) -> Iterator[Change]:
    states: list[tuple[int | None, dict[str, Any]]] = [*kept]
    if now:
        states.append((None, now))
    for (first, before), (last, after) in itertools.pairwise(states):
        assert first is not None
        for path in dict.fromkeys([*before, *after]):
            if before.get(path) != after.get(path):
                yield Change(path, before.get(path), after.get(path), first, last)


def _starts(folder: Path) -> list[Start]:
    found = []
    for path in folder.glob(EVENT_FILES):
        with suppress(OSError, ValueError):
            found.append(_start(regular(path)))
    return sorted(found, key=lambda start: start.when or 0.0)


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
