"""What lies at a path that a user names, as far as its small files tell: asked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.files import check_folder, read_json_object

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REMOTE_FILES = ("configuration_minimax_m1.py", "modeling_minimax_m1.py")
"""The hub's own code; written by others, so only copied where the caller has it."""
MODEL_TYPES = ("minimax", "minimax_m1", "minimax_text_01")
"""Values of config.json's ``model_type`` that can be converted."""


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest complete one of the run.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is no folder: give a checkpoint or a run folder, or hf:FOLDER to start from a Hugging Face one"
        )
    if path.resolve().name.startswith("step_"):
        return path
    found = complete_checkpoints(path)
    if not found:
        if (path / CONFIG).exists():
            raise ValueError(
                f"{path} is a Hugging Face folder, no checkpoint and no run: to start a run from it give hf:{path}, "
                "to make a checkpoint of it run megatron-m1 convert from-hf"
            )
        raise ValueError(f"{path} is no checkpoint, and as a run folder it has no complete one below checkpoints/")
    return found[0]


def check_hub_folder(folder: Path) -> None:
    """Check that a path is a folder with a ``config.json`` of a kind that is known, and weights beside it.

    Raises:
        ValueError: it is not; one line.
    """
    check_folder(folder)
    config = read_hf_config(folder)
    try:
        check_model_type(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}: give a Hugging Face model folder")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        ValueError: the folder or the file is missing, or it is no JSON object.
    """
    if not folder.is_dir():
        raise ValueError(_no_folder(folder))
    path = folder / CONFIG
    try:
        return read_json_object(path)
    except OSError as error:
        if complete_checkpoints(folder) or folder.resolve().name.startswith("step_"):
            raise ValueError(
                f"{folder} is a run or a checkpoint, no Hugging Face folder: to start a run from it give "
                f"--init-from {folder}, to make a Hugging Face folder of it run megatron-m1 convert to-hf"
            ) from error
        raise ValueError(f"{path} can't be read: {error.strerror}; give a Hugging Face model folder") from error


def _no_folder(folder: Path) -> str:
    """Say that there is no such folder: for who takes the hub's name of a model, how to get one."""
    is_name = len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] not in (".", "..")
    name = str(folder) if is_name else "ORGANISATION/NAME"
    return (
        f"{folder} is no folder: a Hugging Face model is read from a local folder, and nothing is downloaded; fetch it "
        f"first, as with hf download {name} --local-dir FOLDER"
    )


def check_model_type(config: Mapping[str, Any]) -> None:
    """Check what kind of model a ``config.json`` says that it describes.

    Raises:
        ValueError: none that can be converted.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        words = f"{', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]}"
        raise ValueError(f"model_type = {kind!r}: only {words} can be converted")


def check_remote_code(folder: Path, format_name: str) -> None:
    """Check that a folder has the hub's own code, and that it can go with an export of that format.

    Raises:
        ValueError: files are missing, or the format is not theirs.
    """
    if format_name == "native":
        raise ValueError(
            "--remote-code goes with --format hub: the hub's code reads neither keys nor rows of --format native"
        )
    missing = next((name for name in REMOTE_FILES if not (folder / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"{folder} has no {missing}: give the folder with the hub's modeling files")
