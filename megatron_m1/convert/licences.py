"""Licence files of an imported folder: kept beside the weights that are made of it, and exported with them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_m1.files import regular, write_atomically

LICENCES = "licences"
"""Folder of an imported model, or of a run that began with one, in which they are, beside ``checkpoints``."""
PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
"""Their names in a Hugging Face folder."""


def licence_id(text: str) -> str:
    """Read ``--license``; argparse puts the option's name before the error."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]{0,79}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no identifier of a licence on the hub: give one such as apache-2.0, mit, cc-by-4.0 or other"
        )
    return text


def licence_files(folder: Path) -> list[Path]:
    """Licence files that lie in a folder, the licences themselves first."""
    return [path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()]


def keep_licences(source: Path, target: Path) -> None:
    """Copy those of ``source`` into ``target``, made if there are some; a file of that name stays as it is there.

    Raises:
        OSError: the disk refuses.
    """
    for path in licence_files(source):
        target.mkdir(parents=True, exist_ok=True)
        if not (target / path.name).exists():
            write_atomically(target / path.name, regular(path).read_bytes())


def licences_of(checkpoint: Path) -> Path:
    """Where the licence files of a checkpoint's run are, if it has some."""
    return checkpoint.resolve().parent.parent / LICENCES


def add_licences(source: Path, target: Path) -> list[str]:
    """Copy those of ``source`` into a Hugging Face folder, where a tokenizer may have brought others.

    Returns:
        Names of all licence files that are there then.

    Raises:
        OSError: the disk refuses.
    """
    for path in licence_files(source):
        content, place = regular(path).read_bytes(), target / path.name
        if place.is_file() and place.read_bytes() != content:
            place.rename(target / f"{path.name}.tokenizer")
        write_atomically(place, content)
    return [path.name for path in licence_files(target)]
