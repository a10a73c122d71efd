"""What a path on the command line means: a checkpoint, a run, a Hugging Face folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_m1.checkpoint.contents import check_model_size, complete_checkpoints, read_checkpoint
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.io import load_config
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.convert.families.minimax_m1.config import CONFIG
from megatron_m1.convert.hub_folder import HubFolder, open_hub_folder
from megatron_m1.convert.our_checkpoint import OurCheckpoint, open_checkpoint
from megatron_m1.convert.tokenizer import TOKENIZER


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest complete one of the run.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give a checkpoint or a run folder")
    if path.resolve().name.startswith("step_"):
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ValueError(f"{path} is no checkpoint, and as a run folder it has no complete one below checkpoints/")
    return found[0]


def open_any(path: Path) -> OurCheckpoint | HubFolder:
    """Open a Hugging Face folder (it has a config.json), a checkpoint, or a run's newest one.

    Raises:
        ValueError: it is none of these, or is damaged.
    """
    if (path / CONFIG).exists():
        return open_hub_folder(path)
    return open_checkpoint(find_checkpoint(path))


def initial_model(config: Config) -> ModelConfig:
    """Shape and numerics of the model that a run with ``run.init_from`` trains.

    A run that goes on with the same ``init_from`` has it in its own checkpoints: their source may be gone. What a
    configuration took from the machine that it ran on is left open again.

    Raises:
        ValueError: there is none, or it is none of ours.
    """
    init_from = config.run.init_from
    assert init_from is not None
    own = complete_checkpoints(Path(config.run.folder)) if config.run.resume else []
    saved = load_config(own[0] / "config.yaml") if own else None
    if saved is not None and saved.run.init_from == init_from:
        return replace(saved.model, transformer_impl=ModelConfig.transformer_impl)
    if init_from == HUGGING_FACE:
        raise ValueError("run.init_from = hf: names no folder: give hf:FOLDER")
    if init_from.startswith(HUGGING_FACE):
        return open_hub_folder(Path(init_from.removeprefix(HUGGING_FACE))).model
    given = read_checkpoint(find_checkpoint(Path(init_from)))
    check_model_size(given)
    return replace(given.config.model, transformer_impl=ModelConfig.transformer_impl)


def tokenizer_of(source: OurCheckpoint | HubFolder) -> Path | None:
    """Where the tokenizer of a checkpoint or folder is said to be; None if nothing says so.

    An imported checkpoint that was moved has it beside itself.
    """
    if isinstance(source, HubFolder):
        return source.folder
    recorded = source.contents.config.data.tokenizer
    if not recorded:
        return None
    beside = source.folder.resolve().parent.parent / TOKENIZER
    return beside if beside.is_dir() and not Path(recorded).exists() else Path(recorded)
