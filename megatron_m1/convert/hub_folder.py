"""A Hugging Face folder as a source of our tensors: names, shapes and sizes checked before any data are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_m1.config import ModelConfig
from megatron_m1.convert.families.minimax_m1.config import has_native_heads, model_from_hf
from megatron_m1.convert.families.minimax_m1.weights import (
    WeightPiece,
    check_names,
    is_native_buffer,
    to_ours,
    units,
)
from megatron_m1.convert.places import CONFIG, INDEX, SINGLE, read_hf_config
from megatron_m1.convert.safetensors_files import Entry, read_header
from megatron_m1.files import check_folder, regular
from megatron_m1.printing import shown


@dataclass
class HubFolder:
    """An opened folder. Make one with ``open_hub_folder``."""

    folder: Path
    config: Mapping[str, Any]
    """Content of config.json."""
    model: ModelConfig
    units: list[WeightPiece]
    files: dict[str, str]
    """File of every weight, by the weight's name."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """dtype and shape of every weight, by name; empty for a dry run without the weights' files."""
    announced: torch.dtype = torch.bfloat16
    """The dtype that the index's total size implies, for want of entries."""
    _open: tuple[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights' bytes have."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return max(sizes, key=lambda dtype: sizes[dtype], default=self.announced)

    def stored_dtype(self, unit: WeightPiece) -> torch.dtype:
        """dtype in which the folder has a unit.

        Raises:
            ValueError: its tensors have several.
        """
        dtypes = {self.entries[part.name].dtype for part in unit.parts}
        if len(dtypes) > 1:
            names = ", ".join(part.name for part in unit.parts)
            raise ValueError(f"{self.folder}: {names} have different dtypes, and together they are one tensor here")
        return dtypes.pop()

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Bytes of all weights as ``dtype``; None keeps each as it is stored.

        Raises:
            ValueError: as of ``stored_dtype``.
        """
        if dtype is not None or not self.entries:
            return expected_bytes(self.units, dtype or self.announced)
        return sum(unit.numel * unit.dtype(self.stored_dtype(unit)).itemsize for unit in self.units)

    def read(self, unit: WeightPiece) -> Tensor:
        """Read a unit as a tensor of ours: shape ``unit.sizes``, dtype as stored, on the CPU.

        Raises:
            ValueError: the file can't be read any more.
        """
        return to_ours(unit, [self._tensor(part.name) for part in unit.parts])

    def _tensor(self, name: str) -> Tensor:
        file = self.files[name]
        path = self.folder / file
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(path, framework="pt"))
            tensor: Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        return tensor


def open_hub_folder(folder: Path, *, headers: bool = True) -> HubFolder:
    """Open a folder with ``config.json`` and safetensors weights, named as in the hub or as native transformers saves.

    Args:
        folder: where it is.
        headers: check the weights' files too; False looks at the index alone, and needs nothing else.

    Raises:
        ValueError: a file is missing or damaged, a name, a shape or the total size is not what config.json implies, or
            config.json describes what this model can't be; one line.
    """
    check_folder(folder)
    config = read_hf_config(folder)
    try:
        model = model_from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    files, announced = _read_index(folder)
    files = {name: file for name, file in files.items() if not is_native_buffer(name)}
    if model.num_moe_experts * model.num_layers > len(files):
        raise ValueError(f"{folder / CONFIG}: {model.num_moe_experts} experts, but there are {len(files)} tensors")
    wanted = units(model, native_heads=has_native_heads(config))
    check_names([part.name for unit in wanted for part in unit.parts], files, str(folder))
    opened = HubFolder(folder, config, model, wanted, files)
    if headers:
        _read_headers(opened)
    elif announced is not None:
        sizes = {expected_bytes(wanted, dtype): dtype for dtype in (torch.bfloat16, torch.float32)}
        # A list compares, where a dict would hash: the file may hold a list here, which has no hash.
        if announced not in list(sizes):
            given = " or ".join(f"{size:,} in {str(dtype)[6:]}" for size, dtype in sizes.items())
            raise ValueError(f"{folder / INDEX}: total_size is {announced}, but the map's tensors have {given}")
        opened.announced = sizes[announced]
    return opened


def expected_bytes(wanted: list[WeightPiece], dtype: torch.dtype) -> int:
    """Bytes of a folder's weights when they have ``dtype``, counted on tensors without memory."""
    total = 0
    for unit in wanted:
        parts = [torch.empty(part.shape, dtype=unit.dtype(dtype), device="meta") for part in unit.parts]
        ours = to_ours(unit, parts)
        assert tuple(ours.shape) == unit.sizes
        total += ours.numel() * ours.element_size()
    return total


def _read_index(folder: Path) -> tuple[dict[str, str], Any]:
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}: give a Hugging Face model folder")
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE), None
    try:
        index = json.loads(regular(path).read_text(encoding="utf-8"))
        if "weight_map" not in index:
            raise ValueError("it has no weight_map")
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
        strange = next((file for file in files.values() if Path(file).name != file or file == ".."), None)
        if strange is not None:
            raise ValueError(f"it names the file {shown(strange)}, which is not in the folder")
        return files, index.get("metadata", {}).get("total_size")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _read_headers(opened: HubFolder) -> None:
    folder = opened.folder
    for file in sorted(set(opened.files.values())):
        held = {name: entry for name, entry in read_header(folder / file).items() if not is_native_buffer(name)}
        check_names([name for name, place in opened.files.items() if place == file], held, str(folder / file))
        opened.entries |= held
    for unit in opened.units:
        for part in unit.parts:
            shape = opened.entries[part.name].shape
            if shape != part.shape:
                raise ValueError(
                    f"{folder / opened.files[part.name]}: {part.name} has shape {list(shape)}, config.json implies "
                    f"{list(part.shape)}"
                )
