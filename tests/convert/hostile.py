"""What the tests of hostile files share: a pickle that runs a command, checkpoints that are sealed again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1 import cli
from megatron_m1.checkpoint import folder as folders
from megatron_m1.checkpoint.metadata import read_metadata
from megatron_m1.data.tokenizers import train_sentencepiece
from tests.checkpoint.checkpoint_runs import open_checkpoints
from tests.convert import runs
from tests.model.meshes import start


class Shell:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def seal(checkpoint: Path) -> None:
    """Give a checkpoint the hashes of what it has: integrity alone is no protection."""
    names = [path.name for path in checkpoint.iterdir() if path.name != folders.MANIFEST]
    files = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / folders.MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end with status 2 and one line."""
    capsys.readouterr()
    assert cli.exit_status(lambda: cli.run([str(word) for word in words])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megatron-m1: error: "), err
    return err


def commands(checkpoint: Path, tmp_path: Path) -> list[list[object]]:
    """What reads a checkpoint; none lacks anything else."""
    run, tokenizer = checkpoint.parents[1], tmp_path / "any.model"
    train_sentencepiece(["one two three four five six seven eight nine ten"] * 3, tokenizer, vocab_size=275)
    start = ["pretrain", "--init-from", run, "--run.folder", tmp_path / "new", "--dry-run", "--data.train", "x"]
    return [
        ["inspect", checkpoint],
        ["convert", "to-hf", run, tmp_path / "out"],
        ["generate", run, "--prompt", "a", "--tokenizer", tokenizer],
        start,
    ]


def resume(rank: int, world_size: int, folder: Path) -> str:
    """Load the run's newest checkpoint as training does; what it says when it can't."""
    try:
        config = runs.config_of({})
        trainer = start(config, world_size)
        open_checkpoints(folder / "checkpoints", config).load_newest(trainer)
    except (ValueError, RuntimeError) as error:
        return f"{error} / {error.__cause__}"
    return "loaded"


def change_metadata(checkpoint: Path, change: Callable[[Any], None]) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def replace_object(checkpoint: Path, name: str, content: Any) -> None:
    """Store something else in place of what is no tensor and has a name that begins so."""
    metadata = read_metadata(checkpoint)
    index = next(index for index in metadata.storage_data if index.fqn.startswith(name))
    payload = io.BytesIO()
    torch.save(content, payload)
    (checkpoint / "__9_0.distcp").write_bytes(payload.getvalue())
    metadata.storage_data[index] = replace(
        metadata.storage_data[index], relative_path="__9_0.distcp", offset=0, length=len(payload.getvalue())
    )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
