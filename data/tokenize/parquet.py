"""The text column of a Parquet file, as bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_m1.data.tokenize.documents import SkipReason
from megatron_m1.data.tokenize.find import check_unchanged, damaged

_BUFFER_BYTES = 1 << 20


def parquet_values(file: Path, column: str, max_rows: int, max_bytes: int) -> Iterator[tuple[bytes | SkipReason, int]]:
    """All values of a column in order, each with its share of the file's bytes.

    Args:
        file: its path.
        column: name of a column of text, or of bytes, which are text that was stored without saying so.
        max_rows: that are decoded at a time.
        max_bytes: about, that are decoded at a time.

    Raises:
        ValueError: the file is damaged, was changed meanwhile, or has no such column.
    """
    with file.open("rb") as stream:
        before = os.fstat(stream.fileno())
        done = 0
        try:
            for rows, values in _decoded(file, column, max_rows, max_bytes):
                for value in values:
                    done += 1
                    yield value, done * before.st_size // rows - (done - 1) * before.st_size // rows
        except (pa.ArrowException, OSError) as error:
            raise damaged(file, error) from error
        check_unchanged(file, before, os.fstat(stream.fileno()))


def _decoded(file: Path, column: str, max_rows: int, max_bytes: int) -> Iterator[tuple[int, list[bytes | SkipReason]]]:
    """Rows of the whole file, and some values, until all have come."""
    # Without a buffer all of a row group's column would be in memory.
    with pq.ParquetFile(file, buffer_size=_BUFFER_BYTES) as table:
        if column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{file} has no column {column!r}: name its text column with --text-key, from {columns}")
        if table.schema_arrow.names.count(column) > 1:
            raise ValueError(f"{file} has several columns called {column!r}: rename those that are not its text")
        at_a_time = max(1, min(max_rows, max_bytes // _row_bytes(table.metadata, column)))
        for batch in table.iter_batches(batch_size=at_a_time, columns=[column]):
            yield table.metadata.num_rows, _as_bytes(batch.column(0))


def _row_bytes(metadata: pq.FileMetaData, column: str) -> int:
    """Uncompressed bytes of a value, at least 1, in the row group where they are largest."""
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
        largest = max(largest, size // max(1, group.num_rows))
    return largest


def _as_bytes(values: pa.Array) -> list[bytes | SkipReason]:
    """Rows as bytes: Arrow does not check that its strings are UTF-8."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    if not any(is_kind(values.type) for is_kind in _KINDS):
        return [SkipReason.NOT_STRING] * len(values)
    return [SkipReason.NOT_STRING if value is None else value for value in values.cast(pa.large_binary()).to_pylist()]


_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
