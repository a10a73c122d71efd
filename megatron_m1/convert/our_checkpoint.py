"""Our checkpoints as a source of units, whatever mesh wrote them, and as a sink that resolves every tensor late.

Both sides are torch's distributed checkpoint reader and writer, without process groups and without megatron-core, which
takes ten seconds to import: it stages a whole state dict before it writes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Buffer, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m1.checkpoint.contents import OPTIMIZER_PREFIX, CheckpointContents, check_model_size, read_checkpoint
from megatron_m1.checkpoint.metadata import UNREADABLE, MetadataReader
from megatron_m1.config import ModelConfig
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece, check_names, units
from megatron_m1.convert.safetensors_files import PIECE

COMMON = "common_state/shard_0_1"
"""Where megatron-core keeps what is no tensor."""


class _IntoOne(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


@dataclass
class OurCheckpoint:
    """An opened checkpoint. Make one with ``open_checkpoint``."""

    contents: CheckpointContents
    units: list[WeightPiece]
    metadata: Metadata
    _reader: FileSystemReader

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.contents.folder

    @property
    def model(self) -> ModelConfig:
        """Its model."""
        return self.contents.config.model

    def _stored(self, unit: WeightPiece) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata[unit.ours]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def stored_dtype(self, unit: WeightPiece) -> torch.dtype:
        """dtype in which the checkpoint has a unit."""
        return self._stored(unit).properties.dtype

    def read(self, unit: WeightPiece) -> Tensor:
        """Read a unit: shape ``unit.sizes``, dtype as stored, on the CPU.

        Raises:
            ValueError: the file can't be read.
        """
        stored = self._stored(unit)
        target = torch.empty(unit.sizes, dtype=stored.properties.dtype)
        region = ChunkStorageMetadata(torch.Size(unit.offsets), torch.Size(unit.sizes))
        items = create_read_items_for_chunk_list(unit.ours, stored, [region])
        if sum(item.lengths.numel() for item in items) != unit.numel:
            raise ValueError(f"checkpoint {self.folder} is damaged: {unit.ours} is not stored completely")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOne(target))
        except UNREADABLE as error:
            raise ValueError(f"checkpoint {self.folder} is damaged: {unit.ours} can't be read ({error})") from error
        return target


def open_checkpoint(folder: Path) -> OurCheckpoint:
    """Open a checkpoint and check that it holds exactly the tensors that the map knows, in their shapes.

    Args:
        folder: ``step_<number>``.

    Raises:
        ValueError: it is incomplete, damaged or another model's; one line.
    """
    contents = read_checkpoint(folder)
    check_model_size(contents)
    wanted = units(contents.config.model)
    held = {t.name: t.shape for t in contents.tensors if not t.name.startswith(OPTIMIZER_PREFIX)}
    check_names([unit.ours for unit in wanted], held, f"checkpoint {folder}")
    for unit in wanted:
        if held[unit.ours] != unit.shape:
            raise ValueError(
                f"checkpoint {folder}: {unit.ours} has shape {list(held[unit.ours])}, its config.yaml implies "
                f"{list(unit.shape)}"
            )
    reader = MetadataReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return OurCheckpoint(contents, wanted, metadata, reader)


def _blob(content: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream


def _tensor_item(unit: WeightPiece, dtype: torch.dtype) -> WriteItem:
    offsets, sizes = torch.Size(unit.offsets), torch.Size(unit.sizes)
    return WriteItem(
        index=MetadataIndex(unit.ours, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype), torch.Size(unit.shape)
        ),
    )


def _object_items(wanted: Sequence[WeightPiece]) -> list[WriteItem]:
    """What megatron-core stores besides tensors and asks for on loading: for every linear an (empty) extra state."""
    names = [COMMON]
    for unit in wanted:
        module = unit.ours.removesuffix(".weight")
        if unit.expert is not None:
            names.append(f"{module}._extra_state/shard_{unit.expert}_{unit.shape[0]}")
        elif module.rpartition(".")[2].startswith("linear_"):
            names.append(f"{module}._extra_state/shard_0_1")
    return [
        WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0))
        for name in names
    ]


class _LatePlanner(DefaultSavePlanner):
    """Resolves a tensor when the writer asks for it, and empties the one before.

    torch's writer keeps every tensor of a file until the file is finished.
    """

    def __init__(self, resolve: Callable[[MetadataIndex], Tensor]) -> None:
        super().__init__()
        self._resolve = resolve
        self._last: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _blob([{}] if write_item.index.fqn == COMMON else [None])
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = self._resolve(write_item.index)
        return self._last


class _PieceFile(io.BufferedWriter):
    """A file that takes what it is given in pieces, and remembers why it could not."""

    fault: OSError | None = None

    def write(self, data: Buffer) -> int:
        # Pieces and the result count bytes, and a buffer of another type would count its items.
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), PIECE):
                super().write(view[start : start + PIECE])
        except OSError as error:
            self.fault = error
            raise
        return len(view)


class _PieceFiles(FileSystem):
    """The file system of torch's writer; what differs is how it writes, and that torch.save hides no OSError."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        raw = io.FileIO(path, "wb")
        file = _PieceFile(raw)
        try:
            yield file
            file.close()
        except (OSError, RuntimeError) as error:
            # Closing ``file`` itself would try once more to write what could not be written.
            raw.close()
            raise file.fault or error from None


class LateWriter:
    """Writes the files of a checkpoint one by one, as torch's writer does for as many ranks.

    Args:
        folder: gets the files; made if missing.
        groups: the units of each file.
        dtypes: of every unit, in the same order.
        resolve: gives a unit as a tensor of that dtype, shaped ``unit.sizes``, contiguous.
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Sequence[WeightPiece]],
        dtypes: Callable[[WeightPiece], torch.dtype],
        resolve: Callable[[WeightPiece], Tensor],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Copying ahead is for tensors on a GPU, and these are all on the CPU.
        self._writer = FileSystemWriter(folder, per_thread_copy_ahead=0, sync_files=False)
        self._writer.fs = _PieceFiles()
        self._resolve = resolve
        self._units = {MetadataIndex(unit.ours, torch.Size(unit.offsets)): unit for group in groups for unit in group}
        plans = [SavePlan([_tensor_item(unit, dtypes(unit)) for unit in group]) for group in groups]
        plans[0] = replace(plans[0], items=[*_object_items(list(self._units.values())), *plans[0].items])
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer.prepare_global_plan(plans)

    def name(self, number: int) -> str:
        """Name of file ``number``."""
        return f"{self._plans[number].storage_data.prefix}0.distcp"

    def items(self, number: int) -> Sequence[WriteItem]:
        """What file ``number`` holds."""
        items: Sequence[WriteItem] = self._plans[number].items
        return items

    def write(self, number: int) -> list[WriteResult]:
        """Write a file, without waiting for the disk.

        Raises:
            OSError: the disk refuses.
            ValueError: the source can't be read.
        """
        planner = _LatePlanner(lambda index: self._resolve(self._units[replace(index, index=None)]))
        results: list[WriteResult] = self._writer.write_data(self._plans[number], planner).value()
        return results

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Write the metadata, once all files are there.

        Args:
            results: what ``write`` returned for each file.
        """
        self._writer.finish(self._metadata, list(results))
