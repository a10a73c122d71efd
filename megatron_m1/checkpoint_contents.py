"""What lies in a checkpoint folder, read from its metadata: no tensor is loaded."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m1.config import Config
from megatron_m1.config_io import load_config

COMMIT_MARK = "metadata.json"
"""Written last by dist_checkpointing: without it the checkpoint is not complete."""

MODEL_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_query_groups",
    "attention_period",
    "moe_ffn_hidden_size",
    "num_moe_experts",
    "vocab_size",
)
"""Fields of ``model`` that a checkpoint and the run that continues it must share."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as all ranks together hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint's configuration, its place in the run, and its tensors."""

    folder: Path
    config: Config
    step: int
    tensors: list[StoredTensor]
    bytes_on_disk: int

    @property
    def tokens(self) -> int:
        """Tokens trained on up to this checkpoint, padding of packs included."""
        return self.step * self.config.train.global_batch_size * self.config.data.seq_length


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [mark.parent for mark in sorted(run_folder.glob(f"checkpoints/step_*/{COMMIT_MARK}"))]
    return [folder for folder in found if re.fullmatch(r"step_\d+", folder.name)]


def check_shape(
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    checkpoint: Path,
    *,
    fix: str = "restore it, or give another run.folder",
) -> None:
    """Check that a model can take a checkpoint's tensors.

    Args:
        wanted: fields of ``model`` of this run.
        saved: those of the checkpoint's configuration.
        checkpoint: its folder, for the message.
        fix: what the user can do, for the message.

    Raises:
        ValueError: one of ``MODEL_SHAPE`` differs.
    """
    for field in MODEL_SHAPE:
        if saved[field] != wanted[field]:
            raise ValueError(f"model.{field} is {wanted[field]}, but checkpoint {checkpoint} has {saved[field]}: {fix}")


def read_checkpoint(folder: Path) -> CheckpointContents:
    """Read what a checkpoint holds, and check that every file is there and as long as the metadata say.

    Args:
        folder: ``<run.folder>/checkpoints/step_<number>``.

    Raises:
        ValueError: it is no checkpoint, is incomplete, or is damaged; one line.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is no folder")
    match = re.fullmatch(r"step_(\d+)", folder.resolve().name)
    if match is None:
        raise ValueError(f"{folder} is no checkpoint: its name must be step_<number>")
    if not (folder / COMMIT_MARK).is_file():
        raise ValueError(f"checkpoint {folder} is incomplete: {COMMIT_MARK} is missing, the save did not finish")
    tensors, extents = _read_metadata(folder)
    for name, end in sorted(extents.items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size < end:
            raise ValueError(f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {end}")
    return CheckpointContents(
        folder=folder,
        config=load_config(folder / "config.yaml"),
        step=int(match[1]),
        tensors=tensors,
        bytes_on_disk=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def _read_metadata(folder: Path) -> tuple[list[StoredTensor], dict[str, int]]:
    """Return the tensors, and for every data file the bytes that it must have."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = FileSystemReader(folder).read_metadata()
        tensors = []
        for name, stored in sorted(metadata.state_dict_metadata.items()):
            if isinstance(stored, TensorStorageMetadata):
                dtype, shape = stored.properties.dtype, tuple(stored.size)
                tensors.append(StoredTensor(name, shape, str(dtype)[6:], math.prod(shape) * dtype.itemsize))
        extents: dict[str, int] = {}
        for storage in (metadata.storage_data or {}).values():
            extents[storage.relative_path] = max(extents.get(storage.relative_path, 0), storage.offset + storage.length)
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        # These are what unpickling torn or flipped bytes raises.
        raise ValueError(f"checkpoint {folder} is damaged: .metadata can't be read ({type(error).__name__})") from error
    return tensors, extents
