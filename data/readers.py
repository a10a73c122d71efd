"""Documents from JSON lines, text files and Parquet, each plain or compressed as its kind allows.

Reading (in one process) is kept apart from parsing (in many): a batch carries raw bytes, and ``documents`` makes text
of them or says why not. The reader does no more than it must, so that it can feed many processes.
"""

from __future__ import annotations

import codecs
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import zstandard

from megatron_m1.data.cuts import LineCut
from megatron_m1.data.documents import (
    BYTE_ORDER_MARK,
    BadDocumentError,
    Part,
    RawBatch,
    SkipReason,
    document_text,
    json_record,
)
from megatron_m1.data.find import check_unchanged, damaged, file_kind
from megatron_m1.data.parquet import parquet_values

_CHUNK_BYTES = 1 << 18
_COMPRESSED_BYTES = 1 << 15
"""Of a compressed file at a time: what comes of it is a multiple."""
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 512
_WIDE_CODES = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""By the bytes that a file begins with; the longer ones first, for one begins with a shorter one."""


def read_batches(files: Sequence[Path], *, text_key: str, cut: LineCut | None = None) -> Generator[RawBatch]:
    """Read all documents in order, in batches of about half a megabyte.

    Args:
        files: from ``find.find_inputs``.
        text_key: Parquet column of the text; of JSON objects only large ones are parsed here.
        cut: where larger documents may be cut into parts, which then come as batches of their own; None leaves them
            whole, each in the memory of its reader.

    Raises:
        ValueError: a compressed or Parquet file is truncated or damaged, a Parquet file has no such column, or a file
            was changed meanwhile; names the file.
    """
    yield from _joined(batch for file in files for batch in _file_batches(file, text_key, cut))


def _file_batches(file: Path, text_key: str, cut: LineCut | None) -> Iterator[RawBatch]:
    kind = file_kind(file)
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
            yield RawBatch(together[0].file, "text", payloads, sum(small.file_bytes for small in together))
            together, payloads, size = [], [], 0
        if not joins or not isinstance(batch.content, list):
            yield batch
            continue
        together.append(batch)
        payloads += batch.content
        size += sum(len(payload) for payload in batch.content)
    if together:
        yield RawBatch(together[0].file, "text", payloads, sum(small.file_bytes for small in together))


def _document_batches(file: Path, chunks: Iterable[tuple[bytes, int]], cut: LineCut | None) -> Iterator[RawBatch]:
    """One document, in parts if it is large and there are places to cut; chunks come with the bytes read so far."""
    pending = bytearray()
    searched = position = reported = 0
    part, following = Part.WHOLE, Part.FIRST
    for chunk, position in _sliced(chunks):
        pending += chunk
        if cut is None or len(pending) < _BATCH_BYTES:
            continue
        at = cut.last(pending, searched)
        if at < 0:
            searched = len(pending) - 1
            continue
        yield RawBatch(file, "text", [bytes(pending[:at])], position - reported, following)
        del pending[:at]
        searched, reported = 0, position
        part, following = Part.LAST, Part.MIDDLE
    yield RawBatch(file, "text", [bytes(pending)], position - reported, part)


def _line_batches(file: Path, text_key: str, cut: LineCut | None) -> Iterator[RawBatch]:
    """The lines of a file in blocks, and those that are larger by themselves."""
    pending = bytearray()
    separator = b""
    searched = position = reported = 0
    for chunk, position in _sliced(_chunks(file)):
        pending += chunk
        if len(pending) < _BATCH_BYTES:
            continue
        separator = separator or _separator(pending)
        # Beyond a block without a separator, the next one ends a large line.
        at = pending.find(separator, searched) if searched else pending.rfind(separator)
        if at < 0:
            searched = len(pending)
            continue
        yield from _block(
            file,
            bytes(pending[:at]).replace(separator, b"\n"),
            position - reported,
            text_key,
            cut if searched else None,
        )
        del pending[: at + 1]
        searched, reported = 0, position
    separator = separator or _separator(pending)
    yield from _block(
        file, bytes(pending).replace(separator, b"\n"), position - reported, text_key, cut if searched else None
    )


def _separator(start: bytearray) -> bytes:
    """What ends the lines of a file that begins so: the line break, but where only carriage returns do."""
    if b"\n" not in start and b"\r" in start and json_record(bytes(start)) is None:
        pieces = bytes(start).split(b"\r")
        if any(json_record(piece) is not None for piece in pieces[:_BATCH_DOCUMENTS]):
            return b"\r"
    return b"\n"


def _block(file: Path, lines: bytes, file_bytes: int, text_key: str, cut: LineCut | None) -> Iterator[RawBatch]:
    """A batch of lines; with ``cut`` it is one line, whose document is cut into parts."""
    if cut is None:
        yield RawBatch(file, "json", lines, file_bytes)
        return
    try:
        text = document_text("json", lines, text_key=text_key).encode("utf-8")
    except BadDocumentError as bad:
        yield RawBatch(file, "text", [bad.reason], file_bytes)
    else:
        yield from _document_batches(file, [(text, file_bytes)], cut)


def _sliced(chunks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same in chunks of limited size."""
    for chunk, position in chunks:
        for start in range(0, len(chunk), _CHUNK_BYTES):
            yield chunk[start : start + _CHUNK_BYTES], position


def _chunks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Uncompressed content in UTF-8 piece by piece, with the number of bytes read from disk so far."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        plain = _decompressed(file, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    elif suffix == ".zst":
        plain = _decompressed(file, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj)
    else:
        plain = _disk_chunks(file, _CHUNK_BYTES)
    return _in_utf8(file, plain)


def _in_utf8(file: Path, chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same without a byte order mark; what that tells to be UTF-16 or UTF-32 is written anew."""
    head, position = b"", 0
    for chunk, position in chunks:
        head += chunk
        if len(head) >= len(codecs.BOM_UTF32):
            break
    code = next((code for mark, code in _WIDE_CODES.items() if head.startswith(mark)), None)
    if code is None:
        yield head.removeprefix(BYTE_ORDER_MARK), position
        yield from chunks
        return
    # Half a surrogate pair is passed on as bytes that are no UTF-8, so that it costs its own document only.
    decoder = codecs.getincrementaldecoder(code)("surrogatepass")
    try:
        yield decoder.decode(head).encode("utf-8", "surrogatepass"), position
        for chunk, position in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass"), position
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise damaged(file, f"no {code.upper()} as its first bytes say: {error.reason}") from error


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
