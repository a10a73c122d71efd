"""Documents from JSON lines, text files and Parquet, each plain or compressed as its kind allows.

Reading (in one process) is kept apart from parsing (in many): a batch carries raw bytes, and ``documents`` makes text
of them or says why not. The reader does no more than it must, so that it can feed many processes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import zstandard

from megatron_m1.data.tokenize.documents import (
    BYTE_ORDER_MARK,
    BadDocumentError,
    Part,
    RawBatch,
    SkipReason,
    document_text,
)
from megatron_m1.data.tokenize.find import check_unchanged, damaged, file_kind
from megatron_m1.data.tokenize.memory import check_document
from megatron_m1.data.tokenize.parquet import parquet_values
from megatron_m1.data.tokenizers.cuts import LineCut

_CHUNK_BYTES = 1 << 18
_COMPRESSED_BYTES = 1 << 15
"""Of a compressed file at a time: what comes of it is a multiple."""
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 512
_LARGE_BYTES = 1 << 26
"""From here on it is looked whether there is memory for a document that nothing was cut from so far."""


def read_batches(
    files: Sequence[Path], *, text_key: str, cut: LineCut | None = None, text_suffixes: Collection[str] = ()
) -> Generator[RawBatch]:
    """Read all documents in order, in batches of about half a megabyte.

    Args:
        files: from ``find.find_inputs``.
        text_key: Parquet column of the text; of JSON objects only large ones are parsed here.
        cut: where larger documents may be cut into parts, which then come as batches of their own; None leaves them
            whole, each in the memory of its reader.
        text_suffixes: as ``find.find_inputs`` got them.

    Raises:
        ValueError: a compressed or Parquet file is truncated or damaged, a Parquet file has no such column, a file was
            changed meanwhile, or a document can't be cut and is too large for the memory; names the file.
    """
    yield from _joined(batch for file in files for batch in _file_batches(file, text_key, cut, text_suffixes))


def _file_batches(file: Path, text_key: str, cut: LineCut | None, text_suffixes: Collection[str]) -> Iterator[RawBatch]:
    kind = file_kind(file, text_suffixes)
    if kind == "text":
        yield from _document_batches(file, _chunks(file), cut)
    elif kind == "json":
        yield from _line_batches(file, text_key, cut)
    else:
        for value, file_bytes in parquet_values(file, text_key, _BATCH_DOCUMENTS, _BATCH_BYTES):
            if isinstance(value, SkipReason):
                yield RawBatch(file, "text", [value], file_bytes)
            else:
                yield from _document_batches(file, [(value.removeprefix(BYTE_ORDER_MARK), file_bytes)], cut)


def _joined(batches: Iterable[RawBatch]) -> Generator[RawBatch]:
    """Documents of kind text come one by one: put neighbours into one batch."""
    together: list[RawBatch] = []
    payloads: list[bytes | SkipReason] = []
    size = 0
    for batch in batches:
        joins = batch.part is Part.WHOLE and isinstance(batch.content, list)
        if together and (not joins or size >= _BATCH_BYTES or len(payloads) >= _BATCH_DOCUMENTS):
            yield _one_batch(together, payloads)
            together, payloads, size = [], [], 0
        if not joins or not isinstance(batch.content, list):
            yield batch
            continue
        together.append(batch)
        payloads += batch.content
        size += sum(len(payload) for payload in batch.content)
    if together:
        yield _one_batch(together, payloads)


def _one_batch(together: Sequence[RawBatch], payloads: list[bytes | SkipReason]) -> RawBatch:
    keys = next((batch.keys for batch in together if batch.keys), ())
    return RawBatch(together[0].file, "text", payloads, sum(batch.file_bytes for batch in together), keys=keys)


def _document_batches(file: Path, chunks: Iterable[tuple[bytes, int]], cut: LineCut | None) -> Iterator[RawBatch]:
    """One document, in parts if it is large and there are places to cut; chunks come with the bytes read so far."""
    pending = bytearray()
    searched = position = reported = 0
    part, following = Part.WHOLE, Part.FIRST
    to_check = _LARGE_BYTES
    for chunk, position in _sliced(chunks):
        pending += chunk
        if len(pending) >= to_check:
            check_document(file, len(pending))
            to_check = 2 * len(pending)
        if cut is None or len(pending) < _BATCH_BYTES:
            continue
        at = cut.last(pending, searched)
        if at < 0:
            searched = len(pending) - 1
            continue
        yield RawBatch(file, "text", [bytes(pending[:at])], position - reported, following)
        del pending[:at]
        searched, reported, to_check = 0, position, _LARGE_BYTES
        part, following = Part.LAST, Part.MIDDLE
    yield RawBatch(file, "text", [bytes(pending)], position - reported, part)


def _line_batches(file: Path, text_key: str, cut: LineCut | None) -> Iterator[RawBatch]:
    """The lines of a file in blocks, and those that are larger by themselves."""
    pending = bytearray()
    searched = position = reported = 0
    for chunk, position in _sliced(_chunks(file)):
        pending += chunk
        if len(pending) < _BATCH_BYTES:
            continue
        # Beyond a block without a line break, the next one ends a large line.
        at = pending.find(b"\n", searched) if searched else pending.rfind(b"\n")
        if at < 0:
            searched = len(pending)
            continue
        yield from _block(file, bytes(pending[:at]), position - reported, text_key, cut if searched else None)
        del pending[: at + 1]
        searched, reported = 0, position
    yield from _block(file, bytes(pending), position - reported, text_key, cut if searched else None)


def _block(file: Path, lines: bytes, file_bytes: int, text_key: str, cut: LineCut | None) -> Iterator[RawBatch]:
    """A batch of lines; with ``cut`` it is one line, whose document is cut into parts."""
    if cut is None:
        if len(lines) >= _LARGE_BYTES:
            check_document(file, len(lines))
        yield RawBatch(file, "json", lines, file_bytes)
        return
    try:
        text = document_text("json", lines, text_key=text_key).encode("utf-8")
    except BadDocumentError as bad:
        yield RawBatch(file, "text", [bad.reason], file_bytes, keys=bad.keys)
    else:
        yield from _document_batches(file, [(text, file_bytes)], cut)


def _sliced(chunks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same in chunks of limited size."""
    for chunk, position in chunks:
        for start in range(0, len(chunk), _CHUNK_BYTES):
            yield chunk[start : start + _CHUNK_BYTES], position


def _chunks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Uncompressed content piece by piece, with the number of bytes read from disk so far."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        plain = _decompressed(file, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    elif suffix == ".zst":
        plain = _decompressed(file, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj)
    else:
        plain = _disk_chunks(file, _CHUNK_BYTES)
    return _without_mark(plain)


def _without_mark(chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same without a byte order mark."""
    head, position = b"", 0
    for chunk, position in chunks:  # noqa: B007  (it is used when the loop has ended)
        head += chunk
        if len(head) >= len(BYTE_ORDER_MARK):
            break
    yield head.removeprefix(BYTE_ORDER_MARK), position
    yield from chunks


def _disk_chunks(file: Path, size: int) -> Iterator[tuple[bytes, int]]:
    position = 0
    with file.open("rb") as stream:
        before = os.fstat(stream.fileno())
        while chunk := stream.read(size):
            position += len(chunk)
            yield chunk, position
        check_unchanged(file, before, os.fstat(stream.fileno()))


class _Frame(Protocol):
    """The decompressor of one gzip member or zstandard frame."""

    @property
    def eof(self) -> bool:
        """The frame is complete."""

    @property
    def unused_data(self) -> bytes:
        """What follows it."""

    def decompress(self, data: bytes, /) -> bytes:
        """Next part of the content."""


def _decompressed(file: Path, new_frame: Callable[[], _Frame]) -> Iterator[tuple[bytes, int]]:
    """Content of all frames. The stream readers of zstandard take a truncated file for a whole one; frames tell."""
    frame = new_frame()
    for compressed, position in _disk_chunks(file, _COMPRESSED_BYTES):
        rest = compressed
        while rest:
            if frame.eof:
                rest = rest.lstrip(b"\0")  # some writers pad between frames
                frame = new_frame() if rest else frame
                continue
            try:
                plain = frame.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                raise damaged(file, error) from error
            rest = frame.unused_data if frame.eof else b""
            if plain:
                yield plain, position
    if not frame.eof:
        raise damaged(file, "it ends before its content does")
