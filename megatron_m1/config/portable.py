"""Paths of a configuration that is kept in a run's folder: they must mean the same wherever it is read.

What lies in the folder is named from there and moves with it; everything else is absolute. Nothing depends on the
directory in which a command was called.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_m1.config.fields import path_fields
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.config.tree import Config

HERE = "."
"""``run.folder`` in a file of the run's folder. Older files have the path that was given, and mean all paths so."""


def portable(config: Config, folder: Path) -> Config:
    """Return a copy whose paths are relative to ``folder`` if they lie in it, and absolute if not."""
    return _with_paths(config, lambda path: _from(folder, path))


def located(config: Config, folder: Path, was: Path | None = None) -> Config:
    """Return a copy of a configuration that lies in a run's folder, with paths that can be opened from here.

    Args:
        config: as ``portable`` made it, or of an older run, whose relative paths start where its command was called:
            as far as the folder's own path tells where that was.
        folder: where the run's folder is now.
        was: where it was, absolute. What is not there any more, and stood beside it, may have moved along with it.
    """
    is_older = config.run.folder != HERE
    origin = _called_in(config.run.folder, folder) if is_older else folder
    moved = None if is_older else _moved(was, folder)

    def find(path: str) -> str:
        place = path if origin is None else os.path.normpath(origin / path)
        return place if moved is None or _is_there(place) else _beside(place, *moved)

    found = _with_paths(config, find)
    found.run.folder = str(folder)
    return found


def absolute(config: Config) -> Config:
    """Return a copy with absolute paths, so that it can be compared with another one."""
    return _with_paths(config, os.path.abspath)


def _with_paths(config: Config, change: Callable[[str], str]) -> Config:
    found = copy.deepcopy(config)
    for field in path_fields():
        group, _, name = field.partition(".")
        owner = getattr(found, group)
        setattr(owner, name, _changed(getattr(owner, name), change))
        for stage in found.stages:
            if field in stage.settings:
                stage.settings[field] = _changed(stage.settings[field], change)
    return found


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [item if _is_weight(item) else _changed(item, change) for item in value]
    if not value or value == HUGGING_FACE:
        return value
    if value.startswith(HUGGING_FACE):
        return HUGGING_FACE + change(value.removeprefix(HUGGING_FACE))
    return change(value)


def _is_weight(item: str) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return True


def _from(folder: Path, path: str) -> str:
    place = os.path.abspath(path)
    for root, below in ((os.path.abspath(folder), place), (os.path.realpath(folder), os.path.realpath(path))):
        if Path(below).is_relative_to(root):
            return os.path.relpath(below, root)
    return place


def _called_in(recorded: str, folder: Path) -> Path | None:
    """The directory from which ``recorded`` is ``folder``, or stands beside it under a former name; None if none is."""
    names, parts = Path(os.path.normpath(recorded)).parts, Path(os.path.abspath(folder)).parts
    was_renamed = parts[-1:] != names[-1:]
    if not names or parts[-len(names) : -1] != names[:-1] or (was_renamed and len(names) == 1):
        return None
    return Path(*parts[: -len(names)])


def _moved(was: Path | None, folder: Path) -> tuple[Path, Path] | None:
    """The outermost directory that was moved, as it was and as it is: a checkout, say. None if nothing was moved."""
    here = Path(os.path.abspath(folder))
    if was is None or was == here:
        return None
    while was.name == here.name and was.name:
        was, here = was.parent, here.parent
    return was, here


def _is_there(path: str) -> bool:
    # A prefix of tokenised files is no file itself.
    return os.path.lexists(path) or os.path.lexists(f"{path}.bin")


def _beside(path: str, was: Path, here: Path) -> str:
    if not Path(path).is_relative_to(was):
        return path
    candidate = str(here / Path(path).relative_to(was))
    return candidate if _is_there(candidate) else path
