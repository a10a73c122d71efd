"""``.metadata`` of a checkpoint, which is a pickle: read so that a stranger's can run nothing, nor lead anywhere.

A pickle may name any function to be called. Ours are made of the few classes of ``ALLOWED``; whatever names another is
refused before anything is called. Bytes inside data files are pickles as well: ``only_tensors`` makes torch refuse in
them what is no plain data.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_m1.checkpoint.folder import DATA_SUFFIX
from megatron_m1.checkpoint.folder import METADATA as FILE
from megatron_m1.checkpoint.pickle_sizes import check_sizes
from megatron_m1.files import regular
from megatron_m1.printing import shown

ALLOWED = {
    "collections": {"OrderedDict"},
    # The folder that was written to, which nobody reads. Python 3.13 has the class in another module.
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
"""Module -> names that a checkpoint's metadata are made of, besides torch's dtypes."""
UNREADABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What unpickling torn, flipped or odd bytes raises, here and in torch."""
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class RefusedError(ValueError):
    """A file wants something that no checkpoint has. One line."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise RefusedError(f"it wants {module}.{name}, which is no part of a checkpoint: do not use this file")


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is that of a file in the folder that is meant, and can't lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's ``.metadata``, and check that it fits the files beside it.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: it is refused, can't be read, names files outside the folder, or tells of more than these hold; one
            line.
    """
    try:
        content = regular(folder / FILE).read_bytes()
        check_sizes(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
        lengths = _lengths(metadata)
        _check_tensors(metadata)
    except RefusedError as error:
        raise ValueError(f"checkpoint {folder} is refused: {FILE}: {error}") from error
    except UNREADABLE as error:
        raise ValueError(f"checkpoint {folder} is damaged: {FILE} can't be read ({type(error).__name__})") from error
    for name, (end, total) in sorted(lengths.items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        size = path.stat().st_size
        if size < max(end, total):
            raise ValueError(f"checkpoint {folder} is damaged: {name} has {size} bytes, not {max(end, total)}")
    return metadata


def _lengths(metadata: Any) -> dict[str, tuple[int, int]]:
    """For every data file where its last piece ends, and the bytes of all its pieces."""
    if not isinstance(metadata, Metadata):
        raise TypeError("no metadata")
    lengths: dict[str, tuple[int, int]] = {}
    for index, storage in (metadata.storage_data or {}).items():
        if not isinstance(index, MetadataIndex) or not isinstance(storage, _StorageInfo):
            raise TypeError("no place in a file")
        name = storage.relative_path
        if not is_plain_name(name):
            raise RefusedError(f"it names the file {shown(name)}, which is not in the checkpoint's folder")
        if not name.endswith(DATA_SUFFIX):
            raise RefusedError(f"it names the file {shown(name)}, which is no {DATA_SUFFIX} file")
        if not _is_size(storage.offset) or not _is_size(storage.length):
            raise ValueError("a place before the file")
        end, total = lengths.get(name, (0, 0))
        lengths[name] = (max(end, storage.offset + storage.length), total + storage.length)
    return lengths


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 1 << 63


def _check_tensors(metadata: Metadata) -> None:
    """Every piece is stored in as many bytes as it has at least, and pieces have no more numbers than their tensor."""
    stored: dict[str, list[int]] = {}
    for index, storage in (metadata.storage_data or {}).items():
        stored.setdefault(index.fqn, []).append(storage.length)
    for name, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, BytesStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(tensor, TensorStorageMetadata):
            raise TypeError("no tensor")
        shapes = [tuple(tensor.size), *(tuple(chunk.sizes) for chunk in tensor.chunks)]
        places = [tuple(chunk.offsets) for chunk in tensor.chunks]
        if any(not _is_size(size) for shape in (*shapes, *places) for size in shape):
            raise ValueError("a tensor of a negative size")
        if {len(shape) for shape in (*shapes, *places)} != {len(shapes[0])}:
            raise ValueError("pieces of another rank than their tensor")
        whole, *pieces = (math.prod(shape) for shape in shapes)
        itemsize = tensor.properties.dtype.itemsize
        if sum(pieces) != whole or whole * itemsize > sum(stored.get(name, ())):
            raise ValueError(f"{name} is larger than what is stored of it")


class MetadataReader(FileSystemReader):
    """torch's reader with ``read_metadata`` in place of its own."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Read the folder's ``.metadata``; errors as of the function."""
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def only_tensors() -> Iterator[None]:
    """Let ``torch.load`` take nothing but tensors and plain data, whatever its callers say.

    megatron-core and torch load the bytes of a checkpoint's data files with ``weights_only=False``; torch has this
    switch against it.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE)
        os.environ.update({name: value for name, value in before.items() if value is not None})
