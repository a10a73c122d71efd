"""What ``tokenize`` may write: never over a file that it reads, nor over one that it did not make."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_m1.data.corpora.loss_mask import loss_path
from megatron_m1.data.corpora.prefix import (
    bin_path,
    idx_path,
    is_bucket,
    is_index_of_sidecar,
    is_sidecar,
    is_split_part,
    names_loss_mask,
    sidecar_path,
)
from megatron_m1.files import check_writable, refuse_overwriting

_ENDS = re.compile(r"(_(up_to|over)_\d+)?(_validation|_test)?")
"""What ``tokenize`` puts behind a prefix."""
WORKING_MARK = ".tokenize"
"""A file in the working folder, which tells it from somebody's folder of the same name."""


def working_path(prefix: str) -> Path:
    """Folder in which the output of ``prefix`` is written until it is whole."""
    return Path(f"{prefix}.partial")


def check_outputs(prefix: str, files: Sequence[Path], tokenizer: Path) -> None:
    """Check that the output of ``tokenize`` replaces nothing but an earlier output.

    Args:
        prefix: of the output.
        files: the documents' files.
        tokenizer: a file or a folder; need not exist yet.

    Raises:
        ValueError: ``prefix`` ends in no name, its folder can't be written, or a file that would be written or removed
            is one that is read, or none that ``tokenize`` made.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(
            f"the output {prefix!r} ends in no name that .bin, .idx and .json can follow: give one, such as "
            f"{os.path.join(prefix, 'corpus')}"
        )
    outputs = [bin_path(prefix), idx_path(prefix), sidecar_path(prefix), loss_path(prefix)]
    read = [*files, tokenizer, *(tokenizer.rglob("*") if tokenizer.is_dir() else ())]
    refuse_overwriting([*outputs, working_path(prefix)], read)
    there = [path for path in outputs if os.path.lexists(path)]
    # The sidecar is the first that is put in place: with a kill in between the rest is still known by it.
    if there and not is_sidecar(sidecar_path(prefix)):
        raise ValueError(
            f"{there[0]} is there, and not by megatron-m1 tokenize ({sidecar_path(prefix)} would say so): move it, or "
            "choose another output"
        )
    if os.path.lexists(loss_path(prefix)) and not names_loss_mask(prefix):
        raise ValueError(
            f"{loss_path(prefix)} is there, and {sidecar_path(prefix)} does not name it: move it, or choose another "
            "output"
        )
    if idx_path(prefix).exists() and not is_index_of_sidecar(prefix):
        raise ValueError(
            f"{idx_path(prefix)} is there, and {sidecar_path(prefix)} tells of another corpus or it is damaged: move "
            "them, or choose another output"
        )
    check_writable(f"the output {prefix}", Path(prefix).parent)


def stale_notes(prefix: str, written: Sequence[str]) -> list[str]:
    """Warn of what stays from another split or other buckets: its documents may be in what is written now as well.

    Args:
        prefix: of the outputs.
        written: the prefixes that are written now.
    """
    name = os.path.basename(prefix)
    sidecars = sorted(Path(prefix).absolute().parent.glob(f"{glob.escape(name)}*.json"))
    notes = []
    for other in (os.path.join(os.path.dirname(prefix), path.name.removesuffix(".json")) for path in sidecars):
        if other in written or not _ENDS.fullmatch(other.removeprefix(prefix)):
            continue
        if other == prefix:
            if is_sidecar(sidecar_path(other)):
                notes.append(
                    f"{other} is of an earlier run without --length-buckets, and has the same documents: remove it"
                )
        elif is_bucket(other):
            notes.append(
                f"{other} is of earlier --length-buckets, and documents of it may be in another corpus of {prefix} now:"
                " remove it, or name the same buckets"
            )
        elif is_split_part(other):
            notes.append(
                f"{other} is of an earlier --split, and documents of it may be in {prefix} now: remove it, or split as"
                " before"
            )
    return notes


@contextmanager
def working_folder(prefix: str) -> Iterator[Path]:
    """A fresh folder beside the output for the length of the block; what a killed run left there is removed.

    Raises:
        ValueError: something of this name is there that ``tokenize`` did not make.
    """
    folder = working_path(prefix)
    if os.path.lexists(folder):
        if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(folder)):
            raise ValueError(f"{folder} is there, and not by megatron-m1 tokenize: move it, or choose another output")
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        (folder / WORKING_MARK).touch()
        yield folder
    finally:
        # What ended the block is what there is to say.
        with suppress(OSError):
            shutil.rmtree(folder)


def _is_ours(folder: Path) -> bool:
    return (folder / WORKING_MARK).is_file()
