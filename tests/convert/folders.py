"""Comparing folders of weights, without the code under test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_m1.cli import run


def convert(*words: object) -> None:
    """Run ``megatron-m1 convert`` in this process."""
    assert run(["convert", *map(str, words)]) == 0


def source_of(direction: str, hub: Path) -> Path:
    """What a conversion in this direction starts from, of the fixture ``hub``."""
    return hub / ("ours/checkpoints/step_00000000" if direction == "to-hf" else "hub")


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder; its index must name each with its file."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert {name for name, place in index.items() if place == file.name} == set(held)
        found |= held
    assert found.keys() == index.keys()
    return found


def prints(tensors: dict[str, Tensor]) -> dict[str, str]:
    """dtype, shape and hash of the bytes of every tensor."""
    return {
        name: f"{value.dtype} {tuple(value.shape)} "
        + hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }
