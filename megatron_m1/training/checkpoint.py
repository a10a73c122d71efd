"""Checkpoints of a run: written beside and renamed, in the background if asked, read by any mesh, the last K kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import distributed as dist

from megatron_m1.checkpoint_contents import check_shape
from megatron_m1.training import checkpoint_folder as folders
from megatron_m1.training.checkpoint_state import load_model_state, load_train_state
from megatron_m1.training.checkpoint_write import Write
from megatron_m1.training.step import Trainer


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none of those there could be read. One line."""


def _on_rank_zero[T](action: Callable[[], T]) -> T:
    """Return on every rank what ``action`` returns on rank 0.

    Raises:
        CheckpointError: it raised an OSError; on every rank.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(f"checkpoints: {outcome[1]}")
    result: T = outcome[0]
    return result


def find_damage(checkpoint: Path) -> str | None:
    """Compare every file with its hash, the files dealt over the ranks. Collective; the same answer on every rank.

    Returns:
        What is wrong with the first bad file, or None.
    """

    def manifest() -> tuple[dict[str, str], str | None]:
        try:
            return folders.read_manifest(checkpoint), None
        except ValueError as error:
            return {}, str(error)

    files, fault = _on_rank_zero(manifest)
    if fault is not None:
        return fault
    mine = dict(list(files.items())[dist.get_rank() :: dist.get_world_size()])
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, folders.first_fault(checkpoint, mine))
    return next((fault for fault in faults if fault is not None), None)


class Checkpoints:
    """The checkpoints of one run. Make it on every rank, torch.distributed running; all methods are collective.

    Args:
        folder: ``<run.folder>/checkpoints``, on a file system that all ranks share. Made by the first save. What an
            interrupted save has left there is removed now.
        keep: newest checkpoints kept; 0 keeps all. While one is written there is one more.
        async_save: write in the background.
        config_text: resolved configuration as YAML, copied into every checkpoint; an attribute that may be replaced.
        note: called on rank 0 with one line for each damaged checkpoint that is passed over.
    """

    def __init__(
        self, folder: Path, *, keep: int, async_save: bool, config_text: str, note: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._async_save = async_save
        self.config_text = config_text
        self._note = note
        self._write: Write | None = None
        self._current_step: int | None = None
        self._sharding_checked = False
        _on_rank_zero(lambda: folders.remove_temporary(folder))

    def save(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Save parameters, optimizer state and ``state``; with ``async_save`` only begin to.

        A save that is still in flight is finished first. Nothing happens when the step's checkpoint has just been
        saved or loaded.

        Args:
            trainer: what is trained.
            state: JSON-able, the same on every rank; ``state["step"]`` names the checkpoint.

        Raises:
            CheckpointError: it can't be written; older checkpoints are as they were.
        """
        self.wait()
        step = int(state["step"])
        if step == self._current_step:
            return
        texts = {folders.CONFIG: self.config_text, folders.STATE: json.dumps(state, indent=2) + "\n"}
        temporary = _on_rank_zero(lambda: folders.start(self._folder, step))
        self._write = Write(
            trainer, temporary, texts, in_background=self._async_save, check_sharding=not self._sharding_checked
        )
        self._sharding_checked = True
        if not self._async_save:
            self.wait()

    def poll(self) -> None:
        """Finish the save in flight if all ranks have written their part. One small all-reduce, none without a save.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._write is not None and self._write.is_done():
            self._finish(self._write)

    def wait(self) -> None:
        """Finish the save in flight, if there is one.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._write is not None:
            self._finish(self._write)

    def _finish(self, write: Write) -> None:
        self._write = None
        digests, failure = write.finish()

        def commit() -> int:
            if failure is not None:
                shutil.rmtree(write.temporary, ignore_errors=True)
                raise OSError(f"{write.temporary.name.removesuffix(folders.TEMPORARY)} can't be written: {failure}")
            checkpoint = folders.commit(write.temporary, write.texts, digests)
            folders.remove_old(self._folder, self._keep)
            return folders.step_of(checkpoint)

        self._current_step = _on_rank_zero(commit)

    def load_newest(self, trainer: Trainer) -> dict[str, Any] | None:
        """Load the newest checkpoint that is not damaged, into any mesh.

        Damaged ones that are newer are named through ``note`` and renamed to ``<name>.damaged``.

        Returns:
            The ``state`` that it was saved with, or None when the folder has no checkpoint.

        Raises:
            CheckpointError: every checkpoint there is damaged.
            ValueError: the model has another shape.
        """
        found, tracked = _on_rank_zero(
            lambda: (folders.checkpoint_folders(self._folder), folders.tracked_step(self._folder))
        )
        if tracked is not None and (not found or tracked > folders.step_of(found[0])):
            self._skip(folders.folder_name(tracked), f"{folders.TRACKER} names it, but it is missing")
        damaged: list[Path] = []
        for checkpoint in found:
            fault = find_damage(checkpoint)
            if fault is None:
                return self._load(trainer, checkpoint, damaged)
            self._skip(checkpoint.name, fault, last=checkpoint == found[-1])
            damaged.append(checkpoint)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged: move them away to start from the beginning"
            )
        return None

    def _skip(self, name: str, fault: str, *, last: bool = False) -> None:
        if dist.get_rank() == 0:
            self._note(
                f"checkpoint {name} is damaged ({fault}): {'none is' if last else 'falling back to the one'} before"
            )

    def _load(self, trainer: Trainer, checkpoint: Path, damaged: list[Path]) -> dict[str, Any]:
        model = yaml.safe_load((checkpoint / folders.CONFIG).read_text())["model"]
        check_shape(yaml.safe_load(self.config_text)["model"], model, checkpoint)
        saved = json.loads((checkpoint / folders.STATE).read_text())
        if saved.get("weights_only"):
            raise ValueError(
                f"checkpoint {checkpoint} holds imported weights and no optimizer state: give it to --init-from, and "
                "choose another run.folder"
            )
        load_train_state(trainer, checkpoint)

        def settle() -> dict[str, Any]:
            for path in damaged:
                folders.set_aside(path)
            if folders.tracked_step(self._folder) != folders.step_of(checkpoint):
                folders.move_tracker(checkpoint)
            state: dict[str, Any] = json.loads((checkpoint / folders.STATE).read_text())
            return state

        state = _on_rank_zero(settle)
        self._current_step = folders.step_of(checkpoint)
        return state


def load_model(trainer: Trainer, checkpoint: Path) -> None:
    """Overwrite the parameters with those of a checkpoint; optimizer moments and step stay as they are. Collective.

    Args:
        trainer: on any mesh.
        checkpoint: a checkpoint folder, its optimizer state, if any, is not read.

    Raises:
        ValueError: it is damaged.
    """
    fault = find_damage(checkpoint)
    if fault is not None:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {fault}")
    load_model_state(trainer, checkpoint)
