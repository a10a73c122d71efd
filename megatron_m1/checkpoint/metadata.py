"""A checkpoint's ``.metadata`` in torch's own classes, and torch's readers kept from running what data files say.

Bytes inside data files are pickles as well: ``only_tensors`` makes torch refuse in them what is no plain data.
"""

from __future__ import annotations

import importlib
import os
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

from megatron_m1.checkpoint.metadata_file import ALLOWED, UNREADABLE, Kinds, read_checked

__all__ = ["UNREADABLE", "MetadataReader", "only_tensors", "read_metadata"]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _find(module: str, name: str) -> Any:
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if name not in ALLOWED.get(module, ()):
        return None
    return getattr(importlib.import_module(module), name)


_OF_TORCH = Kinds(
    find=_find,
    metadata=Metadata,
    index=MetadataIndex,
    storage=_StorageInfo,
    tensor=TensorStorageMetadata,
    data=BytesStorageMetadata,
)


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's ``.metadata``, and check that it fits the files beside it.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: it is refused, can't be read, names files outside the folder, or tells of more than these hold; one
            line.
    """
    metadata: Metadata = read_checked(folder, _OF_TORCH)
    return metadata


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
