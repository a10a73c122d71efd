"""Whether every id of a corpus is one of the vocabulary, and every bound of its index where it must be.

That takes reading the whole corpus, so it is done once: what was found is kept in the cache folder until a file
changes. An id beyond the embedding would train on in silence on several tensor ranks, none of which has its row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.data.files import file_lock, write_atomically
from megatron_m1.data.prefix import INDEX_HEADER_BYTES, bin_path, check_prefix, fingerprint, idx_path

_CHUNK = 1 << 23
"""Tokens or index entries looked at together: bounds the memory."""
_SHOWN_BYTES = 1 << 30
"""From so much to read on, a progress bar is worth its line."""


@dataclass(frozen=True)
class _Extremes:
    """The smallest and the largest id of a corpus, and the tokens that have them first."""

    smallest: int
    smallest_at: int
    largest: int
    largest_at: int


def unread_bytes(prefixes: Sequence[str], cache_folder: Path) -> int:
    """Bytes of those corpora that :func:`check_token_ids` would have to read, since nothing is known of them yet."""
    return sum(bin_path(p).stat().st_size for p in prefixes if _remembered(_record_path(p, cache_folder)) is None)


def check_token_ids(
    prefixes: Sequence[str], *, vocab_size: int, cache_folder: Path, remember: bool = True, show_progress: bool = True
) -> None:
    """Check all ids and the whole index of corpora. Processes that share the cache folder read a corpus once.

    Args:
        prefixes: corpora that ``prefix.check_prefix`` accepts.
        vocab_size: ids must be below it.
        cache_folder: keeps what was found; made if missing. Not written without ``remember``.
        remember: False leaves nothing behind, for a dry run.
        show_progress: draw a progress bar if there is much to read and stderr is a terminal.

    Raises:
        ValueError: an id is negative or not below ``vocab_size``, or an index is damaged; one line.
        OSError: a file can't be read, or the cache folder not be written.
    """
    if remember:
        cache_folder.mkdir(parents=True, exist_ok=True)
    with _progress(unread_bytes(prefixes, cache_folder), show_progress) as progress:
        for prefix in prefixes:
            _check_ids(prefix, _extremes(prefix, cache_folder, progress, remember=remember), vocab_size)


def _check_ids(prefix: str, found: _Extremes, vocab_size: int) -> None:
    if found.smallest < 0:
        bad, place, why = found.smallest, found.smallest_at, "ids are not negative"
    elif found.largest >= vocab_size:
        bad, place, why = found.largest, found.largest_at, f"the vocabulary has {vocab_size:,} tokens"
    else:
        return
    raise ValueError(
        f"{prefix} has the id {bad} at token {place:,} of document {_document_of(prefix, place):,}, but {why}: "
        "tokenise the corpus again, or name the tokenizer that made it"
    )


def _document_of(prefix: str, place: int) -> int:
    """The document, counted from 0, that holds token ``place`` of the corpus."""
    lengths, _, _ = _index_arrays(prefix)
    start, document = 0, 0
    for begin in range(0, len(lengths), _CHUNK):
        ends = start + np.cumsum(lengths[begin : begin + _CHUNK], dtype=np.int64)
        if place < ends[-1]:
            return document + int(np.searchsorted(ends, place, side="right"))
        start, document = int(ends[-1]), document + len(ends)
    return document


def _extremes(prefix: str, cache_folder: Path, progress: Progress, *, remember: bool) -> _Extremes:
    record = _record_path(prefix, cache_folder)
    known = _remembered(record)
    if known is not None:
        return known
    if not remember:
        return _read_corpus(prefix, progress)
    with file_lock(record.with_suffix(".lock")):
        known = _remembered(record)
        if known is None:
            known = _read_corpus(prefix, progress)
            write_atomically(record, json.dumps(asdict(known)).encode())
    return known


def _record_path(prefix: str, cache_folder: Path) -> Path:
    """Where it is kept what was found in a corpus as it is now: sizes, times and both ends of its files decide."""
    state = hashlib.sha256(fingerprint(prefix).encode())
    for path in (bin_path(prefix), idx_path(prefix)):
        status = path.stat()
        # The time of the last change of the inode as well: that of the content can be set back by anybody.
        state.update(f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return cache_folder / f"ids-{state.hexdigest()[:24]}.json"


def _remembered(record: Path) -> _Extremes | None:
    try:
        found: dict[str, Any] = json.loads(record.read_bytes())
        return _Extremes(**{name: int(found[name]) for name in _Extremes.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index_arrays(prefix: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Views of an index: lengths [documents], byte offsets [documents], bounds [documents + 1]."""
    documents = check_prefix(prefix).documents
    path, offset = idx_path(prefix), INDEX_HEADER_BYTES
    lengths = np.memmap(path, np.int32, "r", offset, (documents,))
    offsets = np.memmap(path, np.int64, "r", offset + 4 * documents, (documents,))
    bounds = np.memmap(path, np.int64, "r", offset + 12 * documents, (documents + 1,))
    return lengths, offsets, bounds


def _check_index(prefix: str, item_bytes: int) -> None:
    """Documents follow each other without gaps, and each is one sequence."""
    lengths, offsets, bounds = _index_arrays(prefix)
    expected = 0
    for begin in range(0, len(lengths), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        sizes = lengths[part].astype(np.int64)
        ends = expected + item_bytes * np.cumsum(sizes)
        starts = np.concatenate(([expected], ends[:-1]))
        documents = np.arange(begin, begin + len(sizes))
        wrong = (sizes < 0) | (offsets[part] != starts) | (bounds[begin : begin + len(sizes)] != documents)
        if wrong.any():
            document = begin + int(wrong.argmax())
            raise ValueError(f"{idx_path(prefix)} is damaged at document {document:,}; tokenise the corpus again")
        expected = int(ends[-1])
    if bounds[-1] != len(lengths):
        raise ValueError(f"{idx_path(prefix)} is damaged at its end; tokenise the corpus again")


def _read_corpus(prefix: str, progress: Progress) -> _Extremes:
    dtype = check_prefix(prefix).dtype
    _check_index(prefix, np.dtype(dtype).itemsize)
    tokens: npt.NDArray[np.integer[Any]] = np.memmap(bin_path(prefix), dtype, "r")
    task = progress.add_task(f"checking the ids of {prefix}", total=tokens.nbytes)
    first = int(tokens[0])
    found = _Extremes(first, 0, first, 0)
    for begin in range(0, len(tokens), _CHUNK):
        part = tokens[begin : begin + _CHUNK]
        smallest, largest = int(part.min()), int(part.max())
        # Where they are is looked for only when they are news: twice the reading otherwise.
        if smallest < found.smallest:
            found = _Extremes(smallest, begin + int(part.argmin()), found.largest, found.largest_at)
        if largest > found.largest:
            found = _Extremes(found.smallest, found.smallest_at, largest, begin + int(part.argmax()))
        progress.update(task, advance=part.nbytes)
    return found


def _progress(total_bytes: int, show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal and total_bytes >= _SHOWN_BYTES),
        transient=True,
    )
