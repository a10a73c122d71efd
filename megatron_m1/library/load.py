"""Models by name or path: loaded, without memory, or as numbers. What is wrong is said before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.presets import PRESETS
from megatron_m1.config.resolve import check_model
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.library.places import AnyPath, as_path, find_place, find_tokenizer
from megatron_m1.library.quiet import quiet_libraries
from megatron_m1.plan import parameters
from megatron_m1.plan.parameters import ParameterCounts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megatron_m1.library.model import Model

type Described = str | Config | ModelConfig
"""The name of a preset, the path of a run, a checkpoint or a Hugging Face folder, or a configuration."""


def load(
    path: AnyPath,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    tokenizer: AnyPath | Tokenizer | None = None,
) -> Model:
    """Load the model of a run, a checkpoint or a Hugging Face folder onto one device.

    Args:
        path: a run, for its newest complete checkpoint; a checkpoint, ``RUN/checkpoints/step_<number>``, whatever mesh
            wrote it; or a local Hugging Face folder.
        device: "cpu", "cuda" or "cuda:1", as text or as torch's; auto is the current GPU if there is one.
        dtype: of parameters and products, torch's or "fp32" or "bf16"; None takes that in which they are stored.
            Routers and an FP32 head are fp32 whatever it is.
        tokenizer: one, or its path; None takes the one that the checkpoint names or the folder has. A model without
            one takes ids and packs.

    Raises:
        ValueError: the path is none of these or damaged, there is no such device or dtype, or the tokenizer that is
            given can't be loaded; one line.
    """
    place = find_place(path)
    found = find_tokenizer(place, tokenizer, fix="give load(..., tokenizer=PATH)")
    with quiet_libraries():
        from megatron_m1.library.weights import load_place

        return load_place(place, found, device=device, dtype=dtype)


def parameter_counts(model: Described | Path) -> ParameterCounts:
    """Count the parameters of a model, without building it.

    Args:
        model: the name of a preset (tiny, m1-mid, m1-456b), a configuration, or the path of a run, a checkpoint or a
            Hugging Face folder.

    Raises:
        ValueError: it is none of these, or of no possible model; one line.
    """
    return parameters.parameter_counts(_described(model))


def meta_model(model: Described | Path, *, dtype: torch.dtype | str = "bf16") -> nn.Module:
    """Build a whole model on the meta device: its modules and the shapes of its parameters, without their memory.

    Args:
        model: as of ``parameter_counts``.
        dtype: of parameters, torch's or "fp32" or "bf16"; routers and an FP32 head are fp32 whatever it is.

    Returns:
        megatron-core's ``GPTModel``.

    Raises:
        ValueError: as of ``parameter_counts``, or there is no such dtype.
    """
    described = _described(model)
    with quiet_libraries():
        from megatron_m1.library.weights import build_on_meta

        return build_on_meta(described, dtype=dtype)


def _described(model: Described | Path) -> ModelConfig:
    if isinstance(model, Config):
        shape = model.model
    elif isinstance(model, ModelConfig):
        shape = model
    elif isinstance(model, str) and model in PRESETS:
        shape = PRESETS[model]()
    elif not (path := as_path(model)).exists():
        raise ValueError(f"{model} is no preset ({', '.join(PRESETS)}) and no path: give one")
    else:
        shape = _of_path(path)
    check_model(shape)
    return shape


def _of_path(path: Path) -> ModelConfig:
    place = find_place(path)
    if place.config is not None:
        return place.config.model
    from megatron_m1.convert.hub_folder import open_hub_folder

    return open_hub_folder(place.folder, headers=False).model
