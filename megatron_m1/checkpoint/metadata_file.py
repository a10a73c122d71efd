"""``.metadata`` of a checkpoint, which is a pickle: read so that a stranger's can run nothing, nor lead anywhere.

A pickle may name any function to be called. Ours are made of few classes; whatever names another is refused before
anything is called. Nothing here imports torch, for whom some tensors' names and shapes are all: ``tensors_of`` has
stand-ins for torch's classes. ``metadata.read_metadata`` reads the same file into the real ones, with the same checks.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_m1.checkpoint.folder import DATA_SUFFIX
from megatron_m1.checkpoint.folder import METADATA as FILE
from megatron_m1.checkpoint.pickle_sizes import check_sizes
from megatron_m1.files import regular
from megatron_m1.printing import shown

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


class RefusedError(ValueError):
    """A file wants something that no checkpoint has. One line."""


@dataclass(frozen=True)
class Kinds:
    """The classes of which a checkpoint's metadata are made: torch's, or what stands for them."""

    find: Callable[[str, str], Any]
    """Module and name of a class or function to what is taken for it; None refuses it."""
    metadata: type[Any]
    index: type[Any]
    storage: type[Any]
    tensor: type[Any]
    data: type[Any]
    """Of what is no tensor."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, find: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        found = self._find(module, name)
        if found is None:
            raise RefusedError(f"it wants {module}.{name}, which is no part of a checkpoint: do not use this file")
        return found


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is that of a file in the folder that is meant, and can't lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def read_checked(folder: Path, kinds: Kinds) -> Any:
    """Read a checkpoint's ``.metadata``, and check that it fits the files beside it.

    Args:
        folder: of the checkpoint.
        kinds: what it is made of.

    Returns:
        A ``kinds.metadata``.

    Raises:
        ValueError: it is refused, can't be read, names files outside the folder, or tells of more than these hold; one
            line.
    """
    try:
        content = regular(folder / FILE).read_bytes()
        check_sizes(content)
        metadata = _Unpickler(content, kinds.find).load()
        lengths = _lengths(metadata, kinds)
        _check_tensors(metadata, kinds)
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


def _lengths(metadata: Any, kinds: Kinds) -> dict[str, tuple[int, int]]:
    """For every data file where its last piece ends, and the bytes of all its pieces."""
    if not isinstance(metadata, kinds.metadata):
        raise TypeError("no metadata")
    lengths: dict[str, tuple[int, int]] = {}
    for index, storage in (metadata.storage_data or {}).items():
        if not isinstance(index, kinds.index) or not isinstance(storage, kinds.storage):
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


def _check_tensors(metadata: Any, kinds: Kinds) -> None:
    """Every piece is stored in as many bytes as it has at least, and pieces have no more numbers than their tensor."""
    stored: dict[str, list[int]] = {}
    for index, storage in (metadata.storage_data or {}).items():
        stored.setdefault(index.fqn, []).append(storage.length)
    for name, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, kinds.data):
            continue
        if not isinstance(name, str) or not isinstance(tensor, kinds.tensor):
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


class StoredDtype(NamedTuple):
    """One of torch's dtypes by its name. A pickle can't change it, as it could a dataclass."""

    name: str
    itemsize: int
    """Bytes of one number."""


_BITS = {
    64: ("float64", "int64", "uint64", "complex64"),
    32: ("float32", "int32", "uint32", "complex32"),
    16: ("float16", "bfloat16", "int16", "uint16"),
    8: (
        *("int8", "uint8", "bool"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    ),
    128: ("complex128",),
}
DTYPES = {name: StoredDtype(name, bits // 8) for bits, names in _BITS.items() for name in names}
"""Those of which a stored tensor may be."""


class _Fixed(type):
    """Of classes that a pickle gets into its hands, but may not change for whoever is read next."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(name)


class _Plain(metaclass=_Fixed):
    """Stands for a class of torch's that is attributes and nothing else. It is made empty and then filled."""


class _Index(_Plain):
    """Stands for torch's ``MetadataIndex``, which is a key."""

    fqn: str
    offset: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


class _Metadata(_Plain):
    storage_data: dict[Any, Any]
    state_dict_metadata: dict[str, Any]


class _StorageInfo(_Plain):
    """A place in a file."""


class _Properties(_Plain):
    """Stands for ``TensorProperties``, whose state is a tuple."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        dtype = state[0]
        if not isinstance(dtype, StoredDtype):
            raise TypeError("no dtype")
        self.dtype = dtype


class PlainTensor(_Plain):
    """What is stored of a tensor."""

    properties: _Properties
    size: tuple[int, ...]
    chunks: list[Any]


class _Bytes(_Plain):
    """What is no tensor."""


def _unread(*given: object) -> object:
    """Stand for what is made of plain values and then not read."""
    return given


_STAND_INS: dict[str, dict[str, Any]] = {
    "collections": {"OrderedDict": OrderedDict},
    # The folder that was written to, which nobody reads. Python 3.13 has the class in another module.
    "pathlib": {"PosixPath": _unread},
    "pathlib._local": {"PosixPath": _unread},
    "torch": {"Size": tuple, **DTYPES},
    "torch.serialization": {"_get_layout": _unread},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": _StorageInfo},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata": _Bytes,
        "ChunkStorageMetadata": _Plain,
        "Metadata": _Metadata,
        "MetadataIndex": _Index,
        "StorageMeta": _Plain,
        "TensorProperties": _Properties,
        "TensorStorageMetadata": PlainTensor,
        "_MEM_FORMAT_ENCODING": _unread,
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan": _Plain,
        "TensorWriteData": _Plain,
        "WriteItem": _Plain,
        "WriteItemType": _unread,
    },
}
ALLOWED = {module: set(names) - DTYPES.keys() for module, names in _STAND_INS.items()}
"""Module -> names that a checkpoint's metadata are made of, besides torch's dtypes."""
_STANDING_IN = Kinds(
    find=lambda module, name: _STAND_INS.get(module, {}).get(name),
    metadata=_Metadata,
    index=_Index,
    storage=_StorageInfo,
    tensor=PlainTensor,
    data=_Bytes,
)


def tensors_of(folder: Path) -> dict[str, PlainTensor]:
    """Read which tensors a checkpoint has, by name; errors as of ``read_checked``."""
    found = read_checked(folder, _STANDING_IN).state_dict_metadata
    return {name: found[name] for name in sorted(found) if isinstance(found[name], PlainTensor)}
