"""What a path on the command line means: a checkpoint, a run, a Hugging Face folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m1.checkpoint.contents import check_model_size, complete_checkpoints, read_checkpoint
from megatron_m1.config import Config, DataConfig, ModelConfig
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.config.portable import absolute
from megatron_m1.config.written import read_saved
from megatron_m1.convert.places import CONFIG, check_hub_folder, find_checkpoint
from megatron_m1.convert.tokenizer import has_tokenizer

if TYPE_CHECKING:
    # They bring torch, for which who mistypes a path need not wait.
    from megatron_m1.convert.hub_folder import HubFolder
    from megatron_m1.convert.our_checkpoint import OurCheckpoint


def open_any(path: Path) -> OurCheckpoint | HubFolder:
    """Open a Hugging Face folder (it has a config.json), a checkpoint, or a run's newest one.

    Raises:
        ValueError: it is none of these, or is damaged.
    """
    if (path / CONFIG).exists():
        return _open_hub_folder(path)
    checkpoint = find_checkpoint(path)
    from megatron_m1.convert.our_checkpoint import open_checkpoint

    return open_checkpoint(checkpoint)


def _open_hub_folder(path: Path) -> HubFolder:
    check_hub_folder(path)
    from megatron_m1.convert.hub_folder import open_hub_folder

    return open_hub_folder(path)


def initial_base(config: Config) -> Config:
    """What a run with ``run.init_from`` starts from instead of a preset: the model, and the length of its packs.

    A run that goes on with the same ``init_from`` has it in its own checkpoints: their source may be gone. What a
    configuration took from the machine that it ran on is left open again.

    Raises:
        ValueError: there is none, or it is none of ours.
    """
    init_from = config.run.init_from
    assert init_from is not None
    folder = Path(config.run.folder)
    own = complete_checkpoints(folder) if config.run.resume else []
    saved = read_saved(own[0], folder).asked if own else None
    if saved is not None and absolute(saved).run.init_from == absolute(config).run.init_from:
        return _base(config, saved.model, saved.data.seq_length)
    if init_from == HUGGING_FACE:
        raise ValueError("run.init_from = hf: names no folder: give hf:FOLDER")
    if init_from.startswith(HUGGING_FACE):
        model = _open_hub_folder(Path(init_from.removeprefix(HUGGING_FACE))).model
        longest = model.max_position_embeddings or DataConfig.seq_length
        return _base(config, model, min(DataConfig.seq_length, longest))
    given = read_checkpoint(find_checkpoint(Path(init_from)))
    check_model_size(given)
    return _base(config, given.config.model, given.config.data.seq_length)


def _base(config: Config, model: ModelConfig, seq_length: int) -> Config:
    # Older files have the modules of the machine that wrote them.
    model = replace(model, transformer_impl=ModelConfig.transformer_impl)
    return Config(preset=config.preset, model=model, data=DataConfig(seq_length=seq_length))


def tokenizer_of(source: OurCheckpoint | HubFolder) -> Path | None:
    """Where the tokenizer of a checkpoint or folder is, or was if it is gone; None if nothing says so."""
    from megatron_m1.convert.hub_folder import HubFolder

    return source.folder if isinstance(source, HubFolder) else source.contents.tokenizer


def initial_tokenizer(config: Config) -> Path | None:
    """The tokenizer that comes with ``run.init_from``, or that the run's own newest checkpoint names; None without one.

    Raises:
        ValueError: there is no such folder or checkpoint, or it is damaged.
    """
    init_from = config.run.init_from
    assert init_from is not None
    own = complete_checkpoints(Path(config.run.folder)) if config.run.resume else []
    if own:
        return read_checkpoint(own[0], with_tensors=False).tokenizer
    if init_from.startswith(HUGGING_FACE):
        folder = Path(init_from.removeprefix(HUGGING_FACE))
        return folder if has_tokenizer(folder) else None
    return read_checkpoint(find_checkpoint(Path(init_from)), with_tensors=False).tokenizer
