"""The training loop: batches in, steps, records, checkpoints, a clean end."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_m1.checkpoint.store import CheckpointError, Checkpoints
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.schedules import course
from megatron_m1.config.written import saved_texts, tree_values
from megatron_m1.files import refusal, write_atomically
from megatron_m1.printing import counted
from megatron_m1.runtime import mesh as rank_grid
from megatron_m1.runtime.interrupt import Interrupt
from megatron_m1.runtime.ranks import on_rank_zero
from megatron_m1.runtime.watchdog import Watchdog
from megatron_m1.training.changes import nothing_to_train
from megatron_m1.training.feed import open_feed
from megatron_m1.training.metrics import MetricsLog, print_line
from megatron_m1.training.objective import objective_of
from megatron_m1.training.opening import opening_lines
from megatron_m1.training.profile import ProfilerWindow
from megatron_m1.training.progress import Progress
from megatron_m1.training.resume import resume_lines, start_or_resume
from megatron_m1.training.run_folder import SUMMARY, check_run_folder, sole_writer
from megatron_m1.training.run_tokenizer import own_copy, store_tokenizer
from megatron_m1.training.spike_guard import SpikeError
from megatron_m1.training.stage_change import Restart, next_stage, resolved_at, restart_for
from megatron_m1.training.starts import start_record
from megatron_m1.training.steps_guard import NonFiniteError
from megatron_m1.training.summary import summarise
from megatron_m1.training.trained_model import TrainedModel, build_trained_model
from megatron_m1.training.trainer import Trainer


def open_trainer(
    config: ResolvedConfig,
    mesh: rank_grid.Mesh,
    held: ExitStack,
    *,
    console: Console,
    heartbeat: Callable[[], None] = lambda: None,
) -> Trainer | None:
    """Build the model, start or resume the run, and open its data and its record. Collective.

    A run that has nothing to train is left as it is: None.

    Args:
        config: of the run.
        mesh: from ``mesh.initialise``.
        held: closes the record.
        console: where rank 0 shows lines.
        heartbeat: called before whatever takes long while training.

    Raises:
        ValueError: the newest checkpoint that can be read is in a stage of another mesh.
    """

    trainer = _trainer_of_stage(config, mesh, _note_on(console, mesh), heartbeat, goes_on=False)
    if trainer is not None:
        trainer.log = _open_record(trainer.config, mesh, trainer.progress.step, console, held)
        _record_start(trainer, same_processes=False)
    return trainer


def _trainer_of_stage(
    config: ResolvedConfig,
    mesh: rank_grid.Mesh,
    note: Callable[[str], None],
    heartbeat: Callable[[], None],
    *,
    goes_on: bool,
) -> Trainer | None:
    """Build what trains in the stage in which the run is, without its record; None if nothing is left to train.

    Args:
        config: of that stage, or of another one.
        mesh: the processes.
        note: shows a line on rank 0.
        heartbeat: as of ``open_trainer``.
        goes_on: the stage before it was trained by the same processes.
    """
    config, trained, checkpoints, progress = _load(config, mesh, note, heartbeat)
    spans = course(config.recipe, progress.position)
    if not spans:
        note(nothing_to_train(progress.step, config))
        return None
    config = replace(config, train=replace(config.train, max_steps=spans[-1].last_step))
    if mesh.rank == 0:
        opening, resuming = (
            opening_lines(config, mesh, progress, spans, goes_on=goes_on),
            resume_lines(config, progress),
        )
        for line in (*resuming, *opening) if goes_on else (*opening, *resuming):
            note(line)
    tokenizer = str(own_copy(Path(config.data.tokenizer), Path(config.run.folder)))
    checkpoints.config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    feed = open_feed(config, mesh, spans[0].schedules, progress.stream, note)
    # The run's folder has the whole recipe, a checkpoint that of its stage.
    saved = replace(checkpoints.config, asked=config.recipe)
    _write_configuration(config, saved, progress.step, note)
    return Trainer(config, trained, checkpoints, feed, progress, spans[0], note)


def _load(
    config: ResolvedConfig, mesh: rank_grid.Mesh, note: Callable[[str], None], heartbeat: Callable[[], None]
) -> tuple[ResolvedConfig, TrainedModel, Checkpoints, Progress]:
    """Load the run into a model of the stage that it is in, which may be another one than was expected."""
    while True:
        trained = build_trained_model(config, mesh, objective=objective_of(config.train), heartbeat=heartbeat)
        checkpoints = Checkpoints(
            Path(config.run.folder) / "checkpoints",
            keep=config.run.keep_checkpoints,
            async_save=config.run.async_save,
            config=config,
            note=note,
            max_failures=config.run.max_failed_saves,
        )
        progress = start_or_resume(trained, checkpoints, config, note)
        stage, progress.stages = next_stage(config, progress.position)
        if stage.index == config.stage:
            return config, trained, checkpoints, progress
        restart = restart_for(stage, config, mesh)
        if restart is not None:
            raise ValueError(
                f"step {progress.step}, the newest that can be read, is in stage {stage.name}: start the run on its "
                f"mesh, on {counted(restart.processes, 'process', 'processes')}"
            )
        del trained
        config = resolved_at(config, mesh, progress.position, note)


def _note_on(console: Console, mesh: rank_grid.Mesh) -> Callable[[str], None]:
    """What shows a line on rank 0's console, and nothing on other ranks."""
    return partial(print_line, console) if mesh.rank == 0 else lambda line: None


def _write_configuration(config: ResolvedConfig, saved: ResolvedConfig, step: int, note: Callable[[str], None]) -> None:
    """Keep in the run's folder how it is configured, and its tokenizer. Collective."""
    folder = Path(config.run.folder)

    def write() -> None:
        # The tokenizer last: a folder that has one and no configuration is taken for somebody else's.
        for name, text in reversed(saved_texts(saved, folder).items()):
            write_atomically(folder / name, text.encode())
        store_tokenizer(Path(config.data.tokenizer), folder, step=step, note=note)

    _on_rank_zero(write, folder)


def _open_record(
    config: ResolvedConfig, mesh: rank_grid.Mesh, start_step: int, console: Console, held: ExitStack
) -> MetricsLog | None:
    """Open the log on rank 0. Collective."""
    folder = Path(config.run.folder)
    logs: list[MetricsLog] = []

    def write() -> None:
        log = MetricsLog(
            folder,
            config.run,
            start_step=start_step,
            total_steps=config.train.max_steps,
            settings=tree_values(config),
            console=console,
        )
        logs.append(held.enter_context(log))

    _on_rank_zero(write, folder)
    return logs[0] if mesh.rank == 0 else None


def _record_start(trainer: Trainer, *, same_processes: bool) -> None:
    """Leave a line in starts.jsonl. Collective."""

    def write() -> None:
        if trainer.log is not None:
            trainer.log.log_start(start_record(trainer, same_processes=same_processes))

    _on_rank_zero(write, trainer.folder)


def _train(trainer: Trainer, watchdog: Watchdog, interrupt: Interrupt) -> str | None:
    """Run the remaining steps of a stage; on every rank, the name of the signal that ended them early, if one did."""
    config, progress = trainer.config, trainer.progress
    train = config.train
    stop: str | None = None
    interrupt.promise = _promise(progress.step + 1, train.max_steps)
    rank = trainer.trained.mesh.rank
    window = ProfilerWindow(
        trainer.folder,
        rank=rank,
        start=train.profile_step_start,
        end=train.profile_step_end,
        # A disk may refuse on any rank alone.
        note=trainer.note if rank == 0 else print,
    )
    with ExitStack() as stack:
        stack.callback(window.close)
        while trainer.progress.step < trainer.span.last_step:
            number = trainer.progress.step + 1
            with watchdog.step(number):
                with window.step(number):
                    trainer.step(number)
                went_back = trainer.go_back()
                number = trainer.progress.step
                save_again = trainer.checkpoints.poll()
                is_due = train.eval_interval and number % train.eval_interval == 0 and number < train.max_steps
                if is_due and not went_back:
                    trainer.validate()
                stop = interrupt.should_stop(promise=_promise(number + 1, train.max_steps))
                if stop:
                    trainer.note(f"{stop}: saving step {number}, then leaving")
                is_last = bool(stop) or number == trainer.span.last_step
                if is_last or save_again or (not went_back and trainer.save_is_due()):
                    watchdog.progress()
                    trainer.save(is_last=is_last)
            if stop:
                break
    return stop


def _promise(number: int, last: int) -> str:
    """What is answered to a signal that the ranks will act on after step ``number``."""
    return f"finishing step {number}, then saving" if number <= last else "the run is at its end, and saves anyway"


def _write_summary(trainer: Trainer, summary: dict[str, Any]) -> None:
    path = trainer.folder / SUMMARY
    # What lies in the folder must not depend on where the command was called.
    summary = summary | {"run_folder": os.path.abspath(trainer.folder)}
    try:
        write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        # The checkpoint is saved, and the summary is shown.
        trainer.note(f"{path} can't be written: {error.strerror}")


def _open_folder(config: ResolvedConfig, held: ExitStack, note: Callable[[str], None]) -> None:
    """Take the run folder for this run, on rank 0, before anything in it changes. Collective."""
    folder = Path(config.run.folder)

    def take() -> None:
        check_run_folder(config)
        held.enter_context(sole_writer(folder, note))

    _on_rank_zero(take, folder)


def _on_rank_zero(action: Callable[[], None], folder: Path) -> None:
    try:
        on_rank_zero(action)
    except OSError as error:
        raise ValueError(f"run.folder = {folder} can't be written: {refusal(error, folder)}") from error


def _train_and_wait(trainer: Trainer, watchdog: Watchdog, interrupt: Interrupt) -> str | None:
    """``_train``; if it fails, a checkpoint that is still being written is finished first."""
    try:
        return _train(trainer, watchdog, interrupt)
    except (NonFiniteError, SpikeError):
        # All ranks are here: a checkpoint of a good step that is still being written is worth waiting for.
        try:
            trainer.checkpoints.wait()
        except CheckpointError as error:
            trainer.note(str(error))
        raise


def _run_to_the_end(
    config: ResolvedConfig, mesh: rank_grid.Mesh, interrupt: Interrupt, console: Console
) -> dict[str, Any] | None:
    timeout, note = config.parallel.distributed_timeout_seconds, _note_on(console, mesh)
    # The start has one of its own, which no heartbeat prolongs.
    watchdog = Watchdog(mesh.rank, timeout)
    restart: Restart | None = None
    with ExitStack() as stack:
        with Watchdog(mesh.rank, timeout) as starting, starting.step(0):
            _open_folder(config, stack, note)
            trainer = open_trainer(config, mesh, stack, console=console, heartbeat=watchdog.progress)
        if trainer is None:
            return None
        stack.enter_context(watchdog)
        while True:
            interrupted = _train_and_wait(trainer, watchdog, interrupt)
            config, progress, log = trainer.config, trainer.progress, trainer.log
            if interrupted or progress.step >= config.train.max_steps:
                break
            stage, _ = next_stage(config, progress.position)
            restart = restart_for(stage, config, mesh)
            if restart is not None:
                note(restart.line(config.run.folder))
                break
            with watchdog.step(progress.step):
                # Before the next model is built.
                trainer = None
                gc.collect()
                config = resolved_at(config, mesh, progress.position, note)
                trainer = _trainer_of_stage(config, mesh, note, watchdog.progress, goes_on=True)
            assert trainer is not None, "the run is not at its end"
            trainer.log = log
            _record_start(trainer, same_processes=True)
        with watchdog.step(trainer.progress.step):
            validation_loss = None if interrupted or restart else trainer.validate()
            summary = summarise(config, trainer.feed, progress, validation_loss, interrupted)
        summary["memory_peak_gib"] = trainer.memory_peaks
        if restart is not None:
            summary["next_stage"] = restart.stage
        if mesh.rank == 0:
            _write_summary(trainer, summary)
    return summary


def pretrain(config: ResolvedConfig) -> dict[str, Any] | None:
    """Train as ``config`` says, on every rank of the world that torchrun (or nobody) started.

    Args:
        config: its data paths filled in.

    Returns:
        The summary, the same on every rank: step, tokens, losses, baselines, memory, and ``interrupted``, the name of
        the signal that ended the run early or None. None if there was nothing to train: then nothing is written.

    Raises:
        CheckpointError: too many checkpoints in a row or the last one could not be written, or none of those there
            could be read.
        CollectiveError: a collective failed or timed out.
        ConversionError: the weights to start from could not be written as a checkpoint.
        NonFiniteError: too many steps in a row were not finite.
        SpikeError: the gradient norm had a spike with which the run ends.
        ValueError: another process trains in the run folder, it can't be written or has files that no run wrote, or its
            checkpoint does not fit the configuration.
    """
    mesh = rank_grid.initialise(config.parallel, seed=config.train.seed)
    # Around all of it, so that a signal never finds a process that would just die of it.
    console = Console()
    with Interrupt(_note_on(console, mesh)) as interrupt:
        try:
            return _run_to_the_end(config, mesh, interrupt, console)
        finally:
            rank_grid.shut_down()
