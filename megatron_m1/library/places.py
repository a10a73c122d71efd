"""What a path holds, found out before torch is imported: which checkpoint or folder, and which tokenizer it names."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from megatron_m1.checkpoint.contents import read_checkpoint
from megatron_m1.config import Config
from megatron_m1.convert.places import CONFIG, check_hub_folder, find_checkpoint
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer

type AnyPath = str | PathLike[str]


@dataclass(frozen=True)
class Place:
    """A checkpoint, or a Hugging Face folder."""

    folder: Path
    tokenizer: Path | None
    """Where the tokenizer is said to be."""
    config: Config | None
    """Of a checkpoint."""


def as_path(given: AnyPath) -> Path:
    """Return the path that a caller means, ``~`` expanded.

    Raises:
        ValueError: it is none, or is written as for ``--init-from``.
    """
    if not isinstance(given, str | PathLike) or not str(given):
        raise ValueError(f"{given!r} is no path: give a text that is not empty, or a pathlib.Path")
    path = Path(given)
    if str(given).startswith("hf:") and not path.exists():
        raise ValueError(f"{given}: hf: is for --init-from only, give the folder by itself: {str(given)[3:]}")
    return path.expanduser()


def find_place(path: AnyPath) -> Place:
    """Look at the small files of a path.

    Args:
        path: a run, for its newest complete checkpoint, a checkpoint, or a Hugging Face folder (it has a config.json).

    Raises:
        ValueError: it is none of these.
    """
    path = as_path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a run, a checkpoint or a local Hugging Face folder")
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give a run, a checkpoint or a local Hugging Face folder")
    if (path / CONFIG).exists():
        check_hub_folder(path)
        return Place(path, path, None)
    folder = find_checkpoint(path)
    contents = read_checkpoint(folder, with_tensors=False)
    return Place(folder, contents.tokenizer, contents.became)


def find_tokenizer(place: Place, given: AnyPath | Tokenizer | None, *, fix: str) -> Tokenizer | str:
    """Load the tokenizer of a place, or another one.

    Args:
        place: where it is looked for if none is given.
        given: another one, or its path.
        fix: what the user can do, for the message.

    Returns:
        The tokenizer or, if the place has none that can be loaded, why, in one line.

    Raises:
        ValueError: the one that is given can't be loaded.
    """
    if given is not None and not isinstance(given, str | PathLike):
        missing = [name for name in ("encode", "decode", "eod", "vocab_size") if not hasattr(given, name)]
        if missing:
            raise ValueError(
                f"tokenizer is of type {type(given).__name__}, without {', '.join(missing)}: give its path"
            )
        return given
    path = place.tokenizer if given is None else as_path(given)
    if path is None:
        return f"{place.folder} names no tokenizer: {fix}"
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        message = f"tokenizer {path} can't be read: {strerror}" if strerror else str(error)
        if given is not None:
            raise ValueError(f"{message}; {fix}") from error
        return f"{message}; {fix}"
