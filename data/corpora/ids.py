"""Whether every id of a corpus is one of the vocabulary, and every bound of its index where it must be.

That takes reading the whole corpus, so it is done once: what was found is kept in the cache folder until a file
changes. An id beyond the embedding would train on in silence on several tensor ranks, none of which has its row.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.data.corpora.prefix import INDEX_HEADER_BYTES, bin_path, check_prefix, idx_path, sampled_content
from megatron_m1.files import file_lock, write_atomically

_CHUNK = 1 << 18
"""Tokens or index entries looked at together: few enough for a core's cache, which is faster."""
_SHOWN_BYTES = 1 << 30
"""From so much to read on, it is worth a line."""


@dataclass(frozen=True)
class _Findings:
    """What a corpus holds, whatever the vocabulary."""

    smallest: int
    """Id."""
    largest: int
    """Id."""
    longest: int
    """Tokens of the longest document."""


def unread_bytes(prefixes: Sequence[str], cache_folder: Path) -> int:
    """Bytes of those corpora that :func:`check_token_ids` would have to read, since nothing is known of them yet."""
    return sum(bin_path(p).stat().st_size for p in prefixes if _remembered(_record_path(p, cache_folder)) is None)


def check_token_ids(prefixes: Sequence[str], *, vocab_size: int, cache_folder: Path, remember: bool = True) -> None:
    """Check all ids and the whole index of corpora. Processes that share the cache folder read a corpus once.

    Where that takes seconds, stderr shows a progress bar, or a line a corpus if it is no terminal.

    Args:
        prefixes: corpora that ``prefix.check_prefix`` accepts.
        vocab_size: ids must be below it.
        cache_folder: keeps what was found; made if missing. Not written without ``remember``.
        remember: False leaves nothing behind, for a dry run.

    Raises:
        ValueError: an id is negative or not below ``vocab_size``, no document has a token to predict, an index is
            damaged, or a corpus can't be read or is being written; one line.
        OSError: the cache folder can't be written.
    """
    if remember:
        cache_folder.mkdir(parents=True, exist_ok=True)
    with _progress(unread_bytes(prefixes, cache_folder)) as progress:
        # Hidden, it would stay so when this process is killed.
        progress.console.show_cursor(True)
        for prefix in prefixes:
            _check_findings(prefix, _findings(prefix, cache_folder, progress, remember=remember), vocab_size)


def _check_findings(prefix: str, found: _Findings, vocab_size: int) -> None:
    if found.longest < 2:
        raise ValueError(f"{prefix} has no document of 2 tokens, so there is nothing to predict; take another corpus")
    if found.smallest >= 0 and found.largest < vocab_size:
        return
    place = 0
    for part in _chunks(prefix):
        bad = (part < 0) | (part >= vocab_size)
        if bad.any():
            place += int(bad.argmax())
            token = int(part[bad.argmax()])
            break
        place += len(part)
    else:
        raise ValueError(f"{prefix} is being changed: wait until it is whole")
    why = "ids are not negative" if token < 0 else f"the vocabulary has {vocab_size:,} tokens"
    raise ValueError(
        f"{prefix} has the id {token} at token {place:,}, in document {_document_of(prefix, place):,}, but {why}: "
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


def _findings(prefix: str, cache_folder: Path, progress: Progress, *, remember: bool) -> _Findings:
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
            # What was changed meanwhile may be of either state.
            if record == _record_path(prefix, cache_folder):
                write_atomically(record, json.dumps(asdict(known)).encode())
    return known


def _record_path(prefix: str, cache_folder: Path) -> Path:
    """Where it is kept what was found in a corpus as it is now: sizes, times and blocks of its files decide.

    Nothing that differs between the nodes that share a file system, such as numbers of devices.
    """
    with _reading(prefix):
        state = hashlib.sha256(sampled_content(prefix).encode())
        for path in (bin_path(prefix), idx_path(prefix)):
            status = path.stat()
            # The time of the last change of the inode as well: that of the content can be set back by anybody.
            state.update(f"{status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return cache_folder / f"ids-{state.hexdigest()[:24]}.json"


def _remembered(record: Path) -> _Findings | None:
    try:
        found: dict[str, Any] = json.loads(record.read_bytes())
        return _Findings(**{name: int(found[name]) for name in _Findings.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _index_arrays(prefix: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Views of an index: lengths [documents], byte offsets [documents], bounds [documents + 1]."""
    documents = check_prefix(prefix).documents
    path, offset = idx_path(prefix), INDEX_HEADER_BYTES
    lengths = np.memmap(path, np.int32, "r", offset, (documents,))
    offsets = np.memmap(path, np.int64, "r", offset + 4 * documents, (documents,))
    bounds = np.memmap(path, np.int64, "r", offset + 12 * documents, (documents + 1,))
    return lengths, offsets, bounds


def _longest_document(prefix: str, item_bytes: int) -> int:
    """Check that documents follow each other without gaps, one a sequence; return the tokens of the longest."""
    lengths, offsets, bounds = _index_arrays(prefix)
    expected = longest = 0
    for begin in range(0, len(lengths), _CHUNK):
        sizes = lengths[begin : begin + _CHUNK].astype(np.int64)
        end = begin + len(sizes)
        ends = expected + item_bytes * np.cumsum(sizes)
        starts = np.concatenate(([expected], ends[:-1]))
        wrong = (sizes < 0) | (offsets[begin:end] != starts) | (bounds[begin:end] != np.arange(begin, end))
        if wrong.any():
            document = begin + int(wrong.argmax())
            raise ValueError(f"{idx_path(prefix)} is damaged at document {document:,}; tokenise the corpus again")
        expected, longest = int(ends[-1]), max(longest, int(sizes.max()))
    if bounds[-1] != len(lengths):
        raise ValueError(f"{idx_path(prefix)} is damaged at its end; tokenise the corpus again")
    return longest


def _chunks(prefix: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """All ids, in parts that are good until the next one comes.

    Read, not mapped: what a disk can't give is an error then, where a mapping would end the process.
    """
    summary = check_prefix(prefix)
    buffer: npt.NDArray[np.integer[Any]] = np.empty(_CHUNK, summary.dtype)
    left = summary.tokens
    with _reading(prefix), bin_path(prefix).open("rb") as stream:
        while left:
            part = buffer[:left]
            if stream.readinto(memoryview(part).cast("B")) != part.nbytes:
                raise ValueError(f"{bin_path(prefix)} is being changed: wait until it is whole")
            yield part
            left -= len(part)


def _read_corpus(prefix: str, progress: Progress) -> _Findings:
    dtype = np.dtype(check_prefix(prefix).dtype)
    smallest, largest = int(np.iinfo(dtype).max), int(np.iinfo(dtype).min)
    size, what = bin_path(prefix).stat().st_size, f"checking the ids of {prefix}"
    task = progress.add_task(what, total=size)
    if size >= _SHOWN_BYTES and not progress.console.is_terminal:
        print(f"{what} ({size / 1e9:,.1f} GB)", file=sys.stderr, flush=True)
    with _reading(prefix):
        longest = _longest_document(prefix, dtype.itemsize)
        for part in _chunks(prefix):
            smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
            progress.update(task, advance=part.nbytes)
    return _Findings(smallest, largest, longest)


@contextmanager
def _reading(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{prefix} can't be read: {error.strerror or error}") from error


def _progress(total_bytes: int) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and total_bytes >= _SHOWN_BYTES),
        transient=True,
    )
