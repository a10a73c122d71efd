"""Documents that can only be encoded whole need memory in proportion: what is too large is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import psutil

from megatron_m1.data.tokenize.find import file_kind

_MEMORY_PER_BYTE = 100
"""Bytes of memory that a byte of text takes while a document is encoded whole (measured: 95, SentencePiece 35)."""


def check_text_files(files: Sequence[Path], text_suffixes: Collection[str] = ()) -> None:
    """Check files before anything is read, for a tokenizer that can cut no document.

    Args:
        files: from ``find.find_inputs``.
        text_suffixes: as it got them.

    Raises:
        ValueError: a text file, which is one document, is too large to be encoded whole.
    """
    for file in files:
        if file_kind(file, text_suffixes) == "text":
            check_document(file, file.stat().st_size)


def check_document(file: Path, size: int) -> None:
    """Check one document that has to be encoded whole.

    Args:
        file: where it is.
        size: bytes of its text.

    Raises:
        ValueError: that takes more memory than is free.
    """
    needed, available = size * _MEMORY_PER_BYTE, psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"{file} has a document of {size / 1e6:,.0f} MB that can only be encoded whole, which takes about"
            f" {needed / 1e9:,.0f} GB of memory; {available / 1e9:,.0f} GB are free: split it into several documents"
        )
