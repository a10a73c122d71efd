"""Safetensors files: headers read without data, and files written tensor by tensor.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, [start, end) in the
data), and the data.
"""

from __future__ import annotations

import json
import math
import operator
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.files import partial_path, put_in_place, regular
from megatron_m1.printing import shown

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
PIECE = 128 << 10
"""Bytes handed to the system at a time, as ``cp`` does. For more, Linux takes larger pages into its cache, and the host
of a virtual machine may have to bring these first: up to eight times as slow."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """Read what a file holds, and check that it has all of it.

    Raises:
        ValueError: it is missing, is no safetensors file, has a dtype that is no weight's, is cut off, or its tensors
            overlap or leave gaps.
    """
    try:
        with regular(path).open("rb") as file:
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else _LARGEST_HEADER + 1
            text = file.read(length) if length <= _LARGEST_HEADER else b""
            there = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        dtypes = {str(fields["dtype"]) for fields in header.values()}
        shapes = {name: tuple(operator.index(size) for size in fields["shape"]) for name, fields in header.items()}
        places = {name: tuple(map(operator.index, fields["data_offsets"])) for name, fields in header.items()}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file or is damaged: its header can't be read") from error
    if not dtypes <= _DTYPES.keys():
        raise ValueError(f"{path}: {min(dtypes - _DTYPES.keys())} is no dtype of weights: {', '.join(_DTYPES)} are")
    entries = {name: Entry(name, _DTYPES[header[name]["dtype"]], shape) for name, shape in shapes.items()}
    end = 0
    for name in sorted(entries, key=lambda name: places[name]):
        if min(entries[name].shape, default=0) < 0 or places[name] != (end, end + entries[name].size):
            raise ValueError(
                f"{path} is damaged: its header puts {name} at bytes {shown(list(places[name]))} of the data"
            )
        end += entries[name].size
    expected = _LENGTH.size + length + end
    if there != expected:
        raise ValueError(f"{path} is damaged: it has {there:,} bytes, its header describes {expected:,}")
    return entries


class StreamedFile:
    """A safetensors file that is written tensor by tensor. A context manager; under its name it is whole (not synced).

    Args:
        path: the file; until the end its ``files.partial_path``.
        entries: all tensors, in the order in which they will come.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path = path
        self._part = partial_path(path)
        self._waiting = list(reversed(entries))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.size],
            }
            start += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        # The data begin after the header: padded to 8 bytes, they are aligned for readers that map the file.
        text += b" " * (-len(text) % 8)
        self._header = _LENGTH.pack(len(text)) + text

    def __enter__(self) -> StreamedFile:
        self._file = self._part.open("wb", buffering=0)
        self._write(self._header)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                assert not self._waiting, self._waiting
        finally:
            self._file.close()
        if kind is None:
            put_in_place(self._part, self._path)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view[:PIECE]) :]

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor: on the CPU, dtype and shape as announced, any strides."""
        entry = self._waiting.pop()
        assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, (entry, tensor.dtype, tensor.shape)
        # [...] of any dtype -> its bytes
        self._write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def total_size(entries: Iterable[Entry]) -> int:
    """Bytes of some tensors."""
    return sum(entry.size for entry in entries)
