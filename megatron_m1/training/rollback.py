"""Going back to a checkpoint with the data ahead of it, and how a run that is started again knows of it.

The model, its optimizer, steps and tokens are the checkpoint's; where the data are and what was a spike stays as it is.
That is kept beside the checkpoints until there is a newer one: a run that is killed meanwhile does not meet the same
spike again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_m1.files import read_json_object, refusal, write_atomically
from megatron_m1.runtime.ranks import on_rank_zero
from megatron_m1.training.progress import Progress, stored_progress

RECORD = "went_back.json"
"""File beside the checkpoints."""
STAYS = ("consumed_samples", "spike_guard", "stages", "stream")
"""Fields of ``Progress`` that going back to a checkpoint does not take back."""


def write_record(checkpoints: Path, progress: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Keep in the folder of the checkpoints what else has to be known of a run that has just gone back to one.

    On one rank. A disk that refuses is said: then the run, if it is killed now, comes to the same spike again.
    """
    record = {name: progress[name] for name in ("step", *STAYS)}
    path = checkpoints / RECORD
    try:
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        note(f"{path} can't be written: {refusal(error, checkpoints)}: training goes on")


def with_record(checkpoints: Path, progress: Progress) -> Progress:
    """Return a checkpoint's ``progress``, with what is kept of the last time that the run went back if it was to this
    one. Collective.

    Raises:
        ValueError: the file is no such record; one line.
    """
    path = checkpoints / RECORD

    def read() -> dict[str, Any]:
        return read_json_object(path) if path.exists() else {}

    record = on_rank_zero(read)
    if record.get("step", progress.step) != progress.step or not record:
        return progress
    try:
        if record.keys() != {"step", *STAYS}:
            raise ValueError("it has other names")
        return stored_progress(asdict(progress) | record)
    except ValueError as error:
        raise ValueError(
            f"{path} is no record of a run that went back ({error}): remove it to go on from the checkpoint alone"
        ) from error
