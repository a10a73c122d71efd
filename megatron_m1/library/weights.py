"""From what ``load`` found to a model on a device."""

from __future__ import annotations

import torch
from torch import nn

from megatron_m1.config import Config, ModelConfig
from megatron_m1.convert.families.minimax_m1.config import DTYPES
from megatron_m1.convert.our_checkpoint import OurCheckpoint
from megatron_m1.convert.sources import open_any
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.generate.build import build_model
from megatron_m1.library.model import Model
from megatron_m1.library.places import Place
from megatron_m1.model.whole import build_whole


def load_place(
    place: Place, tokenizer: Tokenizer | str, *, device: torch.device | str, dtype: torch.dtype | str | None
) -> Model:
    """Load a model; see ``load.load``.

    Raises:
        ValueError: there is no such device or dtype, or the place is damaged.
    """
    target = usable_device(device)
    wanted = None if dtype is None else known_dtype(dtype)
    source = open_any(place.folder)
    module = build_model(source, wanted or source.stored_dtype(source.units[0]), target)
    config = source.contents.config if isinstance(source, OurCheckpoint) else Config(model=source.model)
    return Model(module.requires_grad_(False), config, tokenizer, str(place.folder))


def build_on_meta(model: ModelConfig, *, dtype: torch.dtype | str) -> nn.Module:
    """Build a model without memory; see ``load.meta_model``."""
    return build_whole(model, dtype=known_dtype(dtype), device=torch.device("meta"))


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device that is meant, with its index.

    Raises:
        ValueError: there is none of that name, or no such GPU here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device = {device!r}: give auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        fix = ", or call meta_model" if found.type == "meta" else ""
        raise ValueError(f"device = {str(device)!r}: give auto, cpu, cuda or cuda:N{fix}")
    if found.type == "cpu":
        return found
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise ValueError(f"device = {str(device)!r}, but torch finds no GPU here: give cpu")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= gpus:
        raise ValueError(f"device = {str(device)!r}, but there are {gpus} GPUs, numbered from 0: give one of them")
    return torch.device("cuda", index)


def known_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return torch's dtype for one that a model can have.

    Raises:
        ValueError: there is none of that name, or it is none of a model.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype = {str(dtype)!r}: give fp32 or bf16")
    return found
