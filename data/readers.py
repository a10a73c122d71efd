"""Documents from JSON lines, text files and Parquet, each plain or compressed as its kind allows.

Reading (in one process) is kept apart from parsing (in many): a batch carries raw bytes, and :func:`document_text`
makes text of them or says why not.
"""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
_COMPRESSIONS = (".gz", ".zst")
_SUPPORTED = f"{', '.join(_JSON_SUFFIXES + _TEXT_SUFFIXES)} (plain, .gz or .zst) and .parquet"
_CHUNK_BYTES = 1 << 18
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 512
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SkipReason(StrEnum):
    """Why a document is left out."""

    NOT_JSON = "not a JSON object"
    KEY_MISSING = "key missing"
    NOT_STRING = "not a string"
    EMPTY = "empty"
    BAD_UTF8 = "bad UTF-8"


class BadDocumentError(Exception):
    """A document that is skipped."""

    def __init__(self, reason: SkipReason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents of one file, not yet parsed."""

    file: Path
    kind: Literal["json", "text"]
    """json: each payload is one line. text: each payload is the document itself."""
    payloads: list[bytes | SkipReason]
    """A reason stands for a document that could not even be read as bytes."""
    file_bytes: int
    """Bytes on disk that were read for it, for a progress bar."""


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Resolve files, folders (searched recursively) and globs to input files.

    Inputs keep their order; what a folder or glob holds is sorted by path; no file comes twice. Hidden files, files of
    other kinds inside folders, and the sidecars of tokenised corpora are passed over.

    Raises:
        FileNotFoundError: an input does not exist or a glob matches nothing.
        ValueError: no input, a named file of an unknown kind, or a folder without any file of a known kind.
    """
    if not inputs:
        raise ValueError("no input was given; name a file, a folder or a glob")
    found: dict[Path, None] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_input(file.relative_to(path), file)]
            if not files:
                raise ValueError(f"{path} holds no document files; supported are {_SUPPORTED}")
        elif path.exists():
            files = [path]
        else:
            files = sorted(match for match in map(Path, glob.glob(str(item), recursive=True)) if match.is_file())
            if not files:
                raise FileNotFoundError(f"{item} does not exist and matches nothing; correct the path or the glob")
        found.update(dict.fromkeys(files))
    for file in found:
        if _kind(file) is None:
            raise ValueError(f"{file} is of no supported kind; supported are {_SUPPORTED}")
    return list(found)


def _is_input(relative: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    is_sidecar = file.suffix == ".json" and file.with_suffix(".idx").exists()
    return not hidden and not is_sidecar and _kind(file) is not None and file.is_file()


def _kind(file: Path) -> Literal["json", "text", "parquet"] | None:
    name = file.with_suffix("") if file.suffix in _COMPRESSIONS else file
    if name.suffix in _JSON_SUFFIXES:
        return "json"
    if name.suffix in _TEXT_SUFFIXES:
        return "text"
    return "parquet" if file.suffix == ".parquet" else None


def read_batches(files: Sequence[Path], *, text_key: str) -> Generator[RawBatch]:
    """Read all documents in order, in batches of about half a megabyte.

    Args:
        files: from :func:`find_files`.
        text_key: Parquet column of the text; JSON objects are parsed later, by :func:`document_text`.

    Raises:
        ValueError: a compressed or Parquet file is truncated or damaged, or a Parquet file has no such column; names
            the file.
    """
    for file in files:
        kind = _kind(file)
        if kind == "parquet":
            yield from _parquet_batches(file, text_key)
        elif kind == "text":
            text = b"".join(chunk for chunk, _ in _chunks(file))
            yield RawBatch(file, "text", [text], file.stat().st_size)
        else:
            yield from _line_batches(file)


def document_text(kind: Literal["json", "text"], payload: bytes | SkipReason, *, text_key: str) -> str:
    """Text of one document, valid Unicode that is not blank.

    Raises:
        BadDocumentError: with the reason to skip it.
    """
    if isinstance(payload, SkipReason):
        raise BadDocumentError(payload)
    try:
        text = payload.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(SkipReason.BAD_UTF8) from error
    if kind == "json":
        text = _json_text(text, text_key)
    if not text.strip():
        raise BadDocumentError(SkipReason.EMPTY)
    return text


def _json_text(line: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(SkipReason.NOT_JSON) from error
    if not isinstance(record, dict):
        raise BadDocumentError(SkipReason.NOT_JSON)
    if text_key not in record:
        raise BadDocumentError(SkipReason.KEY_MISSING)
    text = record[text_key]
    if not isinstance(text, str):
        raise BadDocumentError(SkipReason.NOT_STRING)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which is no character.
        raise BadDocumentError(SkipReason.BAD_UTF8) from error
    return text


def _line_batches(file: Path) -> Generator[RawBatch]:
    """Batches of the non-blank lines of a file."""
    lines: list[bytes | SkipReason] = []
    pending: list[bytes] = []
    size = position = reported = 0
    for chunk, position in _chunks(file):
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if not others:
            continue
        for line in (b"".join(pending), *others[:-1]):
            if line.strip():
                lines.append(line)
                size += len(line)
            if size >= _BATCH_BYTES or len(lines) >= _BATCH_DOCUMENTS:
                yield RawBatch(file, "json", lines, position - reported)
                lines, size, reported = [], 0, position
        pending = [others[-1]]
    last = b"".join(pending)
    if last.strip():
        lines.append(last)
    yield RawBatch(file, "json", lines, position - reported)


def _chunks(file: Path) -> Generator[tuple[bytes, int]]:
    """Uncompressed content piece by piece, with the number of bytes read from disk so far."""
    if file.suffix == ".gz":
        yield from _decompressed(file, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    elif file.suffix == ".zst":
        yield from _decompressed(file, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj)
    else:
        yield from _disk_chunks(file)


def _disk_chunks(file: Path) -> Generator[tuple[bytes, int]]:
    position = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            position += len(chunk)
            yield chunk, position


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


def _decompressed(file: Path, new_frame: Callable[[], _Frame]) -> Generator[tuple[bytes, int]]:
    """Content of all frames. The stream readers of zstandard take a truncated file for a whole one; frames tell."""
    frame = new_frame()
    for compressed, position in _disk_chunks(file):
        rest = compressed
        while rest:
            if frame.eof:
                rest = rest.lstrip(b"\0")  # some writers pad between frames
                frame = new_frame() if rest else frame
                continue
            try:
                plain = frame.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                raise _damaged(file, error) from error
            rest = frame.unused_data if frame.eof else b""
            if plain:
                yield plain, position
    if not frame.eof:
        raise _damaged(file, "it ends before its content does")


def _damaged(file: Path, why: object) -> ValueError:
    return ValueError(f"{file} is truncated or damaged ({why}); fetch or compress it again")


def _parquet_batches(file: Path, column: str) -> Generator[RawBatch]:
    try:
        table = pq.ParquetFile(file)
        rows = max(1, table.metadata.num_rows)
        if column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{file} has no column {column!r}: name its text column with --text-key, from {columns}")
        done = 0
        for batch in table.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=[column]):
            share = (done + batch.num_rows) * file.stat().st_size // rows - done * file.stat().st_size // rows
            done += batch.num_rows
            yield RawBatch(file, "text", _parquet_payloads(batch.column(0)), share)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _parquet_payloads(values: pa.Array) -> list[bytes | SkipReason]:
    """Rows as bytes: Arrow does not check that its strings are UTF-8."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    elif pa.types.is_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.binary())
    else:
        return [SkipReason.NOT_STRING] * len(values)
    return [SkipReason.NOT_STRING if value is None else value for value in values.to_pylist()]
