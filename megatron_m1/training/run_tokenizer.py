"""The tokenizer in the run's folder: without it, checkpoints that were moved would have nothing that makes text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_m1.checkpoint.folder import TOKENIZER
from megatron_m1.convert.tokenizer import copy_tokenizer
from megatron_m1.data.tokenizers.hf_folder import FILE, FOLDER_FILES, OTHER_VOCABULARIES
from megatron_m1.files import partial_path, regular, sync

_KIND = "config.json"
"""Names the class of a Hugging Face tokenizer that has no ``tokenizer.json``."""


def own_copy(tokenizer: Path, run_folder: Path) -> Path:
    """Where a run has its copy of ``tokenizer``; ``tokenizer`` itself if it lies where copies do."""
    target = run_folder / TOKENIZER
    if tokenizer.resolve().is_relative_to(target.resolve()):
        return tokenizer
    return target if tokenizer.is_dir() else target / tokenizer.name


def is_own(tokenizer: str, run_folder: Path) -> bool:
    """Whether a tokenizer lies where a run has its copy."""
    return bool(tokenizer) and Path(os.path.abspath(tokenizer)).is_relative_to(os.path.abspath(run_folder / TOKENIZER))


def store_tokenizer(tokenizer: Path, run_folder: Path, *, step: int, note: Callable[[str], None]) -> None:
    """Copy the tokenizer of a run into its folder, byte by byte, unless it is there.

    Another one that lies there, of the run until now, is kept under another name.

    Args:
        tokenizer: ``data.tokenizer``, a SentencePiece model or a Hugging Face folder, of which only what belongs to a
            tokenizer is taken.
        run_folder: the run's.
        step: at which the run goes on.
        note: called with a line about a tokenizer that is replaced.

    Raises:
        OSError: the disk refuses.
    """
    target, copy = run_folder / TOKENIZER, own_copy(tokenizer, run_folder)
    if copy == tokenizer or is_copy(copy, tokenizer):
        return
    # The folder has one writer: what lies there is of a killed one.
    for left in run_folder.glob(f".{TOKENIZER}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial = partial_path(target)
    try:
        partial.mkdir()
        _copy(tokenizer, partial)
        if target.exists():
            kept = _free_name(target.with_name(f"{TOKENIZER}.until_step_{step:08d}"))
            target.rename(kept)
            note(f"data.tokenizer is another one than the run's: {target} is its copy now, the former is {kept}")
        partial.rename(target)
        sync(run_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_copy(copy: Path, tokenizer: Path) -> bool:
    """Whether a run's copy of a tokenizer is what ``tokenizer`` is now."""
    try:
        if not tokenizer.is_dir():
            return copy.is_file() and regular(copy).read_bytes() == regular(tokenizer).read_bytes()
        names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
        names |= {name for name in (*FOLDER_FILES, *OTHER_VOCABULARIES) if (tokenizer / name).is_file()}
        return bool(names) and all((copy / name).read_bytes() == (tokenizer / name).read_bytes() for name in names)
    except OSError:
        return False


def _copy(tokenizer: Path, folder: Path) -> None:
    if tokenizer.is_dir():
        copy_tokenizer(tokenizer, folder)
        if not (folder / FILE).exists() and (tokenizer / _KIND).is_file():
            shutil.copyfile(tokenizer / _KIND, folder / _KIND)
    else:
        shutil.copyfile(regular(tokenizer), folder / tokenizer.name)
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def _free_name(wanted: Path) -> Path:
    number, name = 1, wanted
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}.{number}")
    return name
