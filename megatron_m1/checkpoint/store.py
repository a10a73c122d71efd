"""Checkpoints of a run: written beside and renamed, in the background if asked, read by any mesh, the last K kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist

from megatron_m1.checkpoint import folder as folders
from megatron_m1.checkpoint.contents import check_shape
from megatron_m1.checkpoint.state import Trained, load_model_state, load_train_state
from megatron_m1.checkpoint.write import Write
from megatron_m1.config import Config
from megatron_m1.config.io import load_config
from megatron_m1.config.written import saved_texts
from megatron_m1.files import refusal
from megatron_m1.runtime.ranks import first_fault, on_rank_zero

ATTEMPTS = 2
"""For a save while training goes on."""
LAST_ATTEMPTS = 4
"""For the last save, after which nothing can make good for it."""
LAST_PAUSE_SECONDS = 2.0
"""Between two of these."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none of those there could be read. One line."""


def _on_rank_zero[T](action: Callable[[], T]) -> T:
    try:
        return on_rank_zero(action)
    except OSError as error:
        raise CheckpointError(f"checkpoints: {error}") from error


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
    return first_fault(folders.first_fault(checkpoint, mine))


class Checkpoints:
    """The checkpoints of one run. Make it on every rank, torch.distributed running; all methods are collective.

    A save that fails on any rank has failed on all. It is tried again, in the background with the state of then; when
    that fails, too, training may go on with what is there, which nothing removes before there is a newer one.

    Args:
        folder: ``<run.folder>/checkpoints``, on a file system that all ranks share. Made by the first save. What an
            interrupted save has left there is removed now.
        keep: newest checkpoints kept; 0 keeps all. While one is written there is one more.
        async_save: write in the background.
        config: of the run, written into every checkpoint; an attribute that may be replaced.
        note: called on rank 0 with one line for each damaged checkpoint that is passed over, and for what the disk
            refuses.
        max_failures: saves in a row that may fail; the last of them raises.

    Raises:
        CheckpointError: what an interrupted save has left can't be removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        async_save: bool,
        config: Config,
        note: Callable[[str], None],
        max_failures: int = 1,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._async_save = async_save
        self.config = config
        self._note = note
        self._max_failures = max_failures
        self._attempts = 0
        self._failures = 0
        self._write: Write | None = None
        self._current_step: int | None = None
        self._sharding_checked = False
        _on_rank_zero(lambda: folders.remove_temporary(folder))

    def save(self, trained: Trained, state: dict[str, Any], *, is_last: bool = False) -> bool:
        """Save parameters, optimizer state and ``state``; with ``async_save`` only begin to.

        A save that is still in flight is finished first. Nothing happens when the step's checkpoint has just been
        saved or loaded.

        Args:
            trained: what is trained.
            state: JSON-able, the same on every rank; ``state["step"]`` names the checkpoint.
            is_last: nothing comes after it: it is written at once, and tried more often.

        Returns:
            Whether it is saved, or begun; False if it can't be written, which has been said.

        Raises:
            CheckpointError: it can't be written, and it is the last one or too many have failed; older checkpoints
                are as they were.
        """
        self.wait()
        step = int(state["step"])
        if step == self._current_step:
            return True
        while True:
            trained.heartbeat()
            failure = self._begin(trained, state, in_background=self._async_save and not is_last)
            if failure is None and self._write is not None and (is_last or not self._async_save):
                failure = self._end(self._write)
            if failure is None:
                return True
            if not self._is_tried_again(step, failure, is_last=is_last):
                return False

    def poll(self) -> bool:
        """Finish the save in flight if all ranks have written their part. One small all-reduce, none without a save.

        Returns:
            Whether it has failed and should be tried again: call ``save``.

        Raises:
            CheckpointError: see ``save``.
        """
        return self._write is not None and self._write.is_done() and self._settle(self._write)

    def wait(self) -> bool:
        """Finish the save in flight, if there is one; returns and raises as ``poll``."""
        return self._write is not None and self._settle(self._write)

    def _settle(self, write: Write) -> bool:
        failure = self._end(write)
        step = folders.step_of(Path(write.temporary.stem))
        return failure is not None and self._is_tried_again(step, failure, is_last=False)

    def _begin(self, trained: Trained, state: dict[str, Any], *, in_background: bool) -> str | None:
        """Start to write; on every rank, what is in the way."""
        texts = saved_texts(self.config, self._folder.parent)
        texts[folders.STATE] = json.dumps(state, indent=2) + "\n"
        try:
            temporary = on_rank_zero(lambda: folders.start(self._folder, int(state["step"])))
        except OSError as error:
            return refusal(error, self._folder)
        fault = None
        try:
            # What a rank can't reach should not come out between the collectives of megatron-core.
            temporary.mkdir(exist_ok=True)
        except OSError as error:
            fault = refusal(error, temporary)
        failure = first_fault(fault)
        if failure is not None:
            self._discard(temporary)
            return failure
        self._write = Write(
            trained, temporary, texts, in_background=in_background, check_sharding=not self._sharding_checked
        )
        self._sharding_checked = True
        return None

    def _end(self, write: Write) -> str | None:
        """Finish a save; on every rank, what went wrong."""
        self._write = None
        digests, failure = write.finish()

        def commit() -> str | None:
            if failure is not None:
                return failure
            try:
                checkpoint = folders.commit(write.temporary, write.texts, digests)
            except OSError as error:
                return refusal(error, write.temporary)
            self._tidy(checkpoint)
            return None

        outcome = on_rank_zero(commit)
        if outcome is not None:
            self._discard(write.temporary)
            return outcome
        self._attempts = self._failures = 0
        self._current_step = folders.step_of(Path(write.temporary.stem))
        return None

    def _tidy(self, checkpoint: Path) -> None:
        """What the checkpoint is good without."""
        try:
            folders.move_tracker(checkpoint)
            folders.remove_old(self._folder, self._keep)
        except OSError as error:
            self._say(f"checkpoint {checkpoint.name} is saved, but: {refusal(error, self._folder)}")

    def _discard(self, temporary: Path) -> None:
        """Remove what a failed save has written: the next one needs the room."""
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    def _is_tried_again(self, step: int, failure: str, *, is_last: bool) -> bool:
        """Count a failed attempt, say it, and tell whether another one is due."""
        name = folders.folder_name(step)
        self._attempts += 1
        if self._attempts < (LAST_ATTEMPTS if is_last else ATTEMPTS):
            self._say(f"checkpoint {name} can't be written: {failure}: trying again")
            if is_last:
                time.sleep(LAST_PAUSE_SECONDS)
            return True
        self._attempts = 0
        self._failures += 1
        good = "there is none" if self._current_step is None else folders.folder_name(self._current_step)
        if is_last or self._failures >= self._max_failures:
            times = f" ({self._failures} saves in a row)" if self._failures > 1 else ""
            raise CheckpointError(f"checkpoints: {name} can't be written: {failure}{times}; the last good one: {good}")
        self._say(f"checkpoint {name} can't be written: {failure}: training goes on; the last good one: {good}")
        return False

    def _say(self, line: str) -> None:
        if dist.get_rank() == 0:
            self._note(line)

    def load_newest(self, trained: Trained) -> dict[str, Any] | None:
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
                return self._load(trained, checkpoint, damaged)
            self._skip(checkpoint.name, fault, last=checkpoint == found[-1])
            damaged.append(checkpoint)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged: move them away to start from the beginning"
            )
        return None

    def _skip(self, name: str, fault: str, *, last: bool = False) -> None:
        self._say(f"checkpoint {name} is damaged ({fault}): {'none is' if last else 'falling back to the one'} before")

    def _load(self, trained: Trained, checkpoint: Path, damaged: list[Path]) -> dict[str, Any]:
        saved_model = load_config(checkpoint / folders.CONFIG).model
        check_shape(self.config.model, saved_model, checkpoint)
        saved = folders.read_state(checkpoint)
        if saved.get("weights_only"):
            raise ValueError(
                f"checkpoint {checkpoint} holds imported weights and no optimizer state: give it to --init-from, and "
                "choose another run.folder"
            )
        load_train_state(trained, checkpoint)

        def settle() -> None:
            for path in damaged:
                folders.set_aside(path)
            if folders.tracked_step(self._folder) != folders.step_of(checkpoint):
                folders.move_tracker(checkpoint)

        _on_rank_zero(settle)
        self._current_step = folders.step_of(checkpoint)
        return saved


def load_model(trained: Trained, checkpoint: Path) -> None:
    """Overwrite the parameters with those of a checkpoint; optimizer moments and step stay as they are. Collective.

    Args:
        trained: on any mesh.
        checkpoint: a checkpoint folder, its optimizer state, if any, is not read.

    Raises:
        ValueError: it is damaged.
    """
    check_undamaged(checkpoint)
    load_model_state(trained, checkpoint)


def check_undamaged(checkpoint: Path) -> None:
    """Compare every file with its hash. Collective.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    fault = find_damage(checkpoint)
    if fault is not None:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {fault}")
