"""The training loop: batches in, steps, records, checkpoints, a clean end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.folder import CONFIG, folder_name
from megatron_m1.checkpoint.store import CheckpointError, Checkpoints
from megatron_m1.checkpoint.write import refusal
from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.io import config_text, load_config, write_config
from megatron_m1.files import write_atomically
from megatron_m1.runtime import mesh as rank_grid
from megatron_m1.runtime.interrupt import Interrupt, any_rank
from megatron_m1.runtime.ranks import on_rank_zero
from megatron_m1.runtime.watchdog import Watchdog
from megatron_m1.training.feed import Feed, global_flops, open_feed
from megatron_m1.training.init_from import load_initial
from megatron_m1.training.lr import learning_rate
from megatron_m1.training.metrics import MetricsLog
from megatron_m1.training.profile import ProfilerWindow
from megatron_m1.training.run_folder import SUMMARY, check_run_folder, sole_writer
from megatron_m1.training.step import StepResult, Trainer, evaluate, train_step
from megatron_m1.training.steps_guard import NonFiniteError, StepsGuard
from megatron_m1.training.summary import summarise
from megatron_m1.training.trainer import build_trainer


@dataclass
class Progress:
    """What a checkpoint holds besides tensors, the same on every rank."""

    step: int = 0
    tokens: int = 0
    consumed_samples: int = 0
    train_samples: int = 0
    """Packs in one pass, as the run began: their order depends on it."""
    skipped_total: int = 0
    skipped_in_row: int = 0


STREAM_FIELDS = {"data.train", "data.seq_length", "data.reset_at_documents", "train.seed", "train.global_batch_size"}
"""Fields that decide which tokens come next."""
FREE_FIELDS = {"data.cache_folder", "data.train_samples", "data.embedded_corpus", "train.max_steps"}
"""Fields that may differ between the parts of a run without being worth a word."""


def changed_fields(saved: Config, now: Config) -> dict[str, str]:
    """Describe the fields of model, mesh, data, optimizer and training that differ, by dotted path."""
    changes = {}
    if saved.run.init_from != now.run.init_from:
        changes["run.init_from"] = (
            f"run.init_from {saved.run.init_from} -> {now.run.init_from}, which is not read again"
        )
    for group in ("model", "parallel", "data", "optimizer", "train"):
        before, after = asdict(getattr(saved, group)), asdict(getattr(now, group))
        for name, value in before.items():
            path = f"{group}.{name}"
            if value != after[name] and path not in FREE_FIELDS:
                changes[path] = f"{path} {value} -> {after[name]}"
    return changes


class Run:
    """One process's share of a run, between the start (or resume) and the end."""

    def __init__(self, config: ResolvedConfig, mesh: rank_grid.Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.folder = Path(config.run.folder)
        self.log: MetricsLog | None = None
        self.trainer: Trainer = build_trainer(config, mesh)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep=config.run.keep_checkpoints,
            async_save=config.run.async_save,
            config_text=config_text(config),
            note=self.note,
            max_failures=config.run.max_failed_saves,
        )
        self.progress = self._start_or_resume()
        # What the run uses, not what was asked for: another number of packs would be another order of the data.
        self.config = replace(config, data=replace(config.data, train_samples=self.progress.train_samples))
        self.checkpoints.config_text = config_text(self.config)
        self.guard = StepsGuard(config.train.max_skipped_steps)
        self.guard.load_state_dict({"total": self.progress.skipped_total, "in_row": self.progress.skipped_in_row})
        self.feed: Feed = open_feed(config, mesh, self.progress.train_samples)
        self.last_save = time.monotonic()

    def note(self, line: str) -> None:
        """Show a line on rank 0's console."""
        if self.mesh.rank != 0:
            return
        if self.log is not None:
            self.log.note(line)
        else:
            print(line, flush=True)

    def _start_or_resume(self) -> Progress:
        state = self.checkpoints.load_newest(self.trainer) if self.config.run.resume else None
        if state is None:
            if self.config.run.init_from is not None:
                initial = load_initial(self.trainer, self.config)
                self.note(f"starting from the weights of {initial}")
            return Progress(train_samples=self.config.data.train_samples)
        progress = Progress(**state)
        self.note(f"resumed from step {progress.step} ({progress.tokens:,} tokens)")
        self._note_changes(progress)
        return progress

    def _note_changes(self, progress: Progress) -> None:
        """Say what differs from the checkpoint that was loaded."""
        if self.mesh.rank != 0:
            return
        saved = load_config(self.folder / "checkpoints" / folder_name(progress.step) / CONFIG)
        changes = changed_fields(saved, self.config)
        if changes:
            self.note("changed since that checkpoint: " + ", ".join(changes.values()))
        if STREAM_FIELDS & changes.keys():
            self.note("so the data are not the stream that would have come: packs are counted on, but cut anew")

    def step(self, number: int) -> StepResult:
        """Train on the next global batch and record it.

        Raises:
            NonFiniteError: one step too many in a row was not finite; it is recorded as well.
        """
        config, progress = self.config, self.progress
        began = time.perf_counter()
        samples = self.feed.training.microbatches(progress.consumed_samples)
        lr = learning_rate(progress.tokens + config.tokens_per_step, config.optimizer)
        result = train_step(self.trainer, samples, lr)
        progress.step = number
        progress.tokens += config.tokens_per_step
        progress.consumed_samples += config.train.global_batch_size
        flops = global_flops(config, self.mesh, samples)
        seconds = time.perf_counter() - began
        try:
            self.guard.accepts(number, result.loss, result.grad_norm)
        finally:
            progress.skipped_total, progress.skipped_in_row = self.guard.total, self.guard.in_row
            self._record(result, lr, flops, seconds)
        return result

    def _record(self, result: StepResult, lr: float, flops: float, seconds: float) -> None:
        if self.log is None:
            return
        config, progress = self.config, self.progress
        self.log.log_step(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": result.loss,
                "aux_loss": result.aux_loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "tokens_per_second": config.tokens_per_step / seconds,
                "model_tflops_per_device": flops / seconds / self.mesh.world_size / 1e12,
                "expert_load_max_over_mean": result.expert_load,
                "skipped_steps": progress.skipped_total,
            }
        )

    def validate(self) -> float | None:
        """Loss over the held-out packs in nats per token; None without any."""
        if self.feed.validation is None:
            return None
        result = evaluate(self.trainer, self.feed.validation.microbatches(0))
        if self.log is not None:
            self.log.log_validation(self.progress.step, result.loss)
        return result.loss

    def save(self, *, is_last: bool = False) -> None:
        """Write a checkpoint of the current step (collective).

        Raises:
            CheckpointError: it can't be written, and training can't go on without it.
        """
        began = time.monotonic()
        is_written = self.checkpoints.save(self.trainer, asdict(self.progress), is_last=is_last)
        self.last_save = time.monotonic()
        if is_written:
            how = "is being written in the background" if self.config.run.async_save and not is_last else "saved"
            self.note(f"checkpoint {folder_name(self.progress.step)} {how} ({self.last_save - began:.1f} s)")

    def save_is_due(self) -> bool:
        """Whether an interval in steps or minutes has passed; the same answer on every rank."""
        run = self.config.run
        if run.save_interval and self.progress.step % run.save_interval == 0:
            return True
        if not run.save_interval_minutes:
            return False
        return any_rank(time.monotonic() - self.last_save >= 60.0 * run.save_interval_minutes)


def _train(run: Run, watchdog: Watchdog, interrupt: Interrupt) -> str | None:
    """Run the remaining steps; return the name of the signal that ended them early, if one did, on every rank."""
    config, progress = run.config, run.progress
    train = config.train
    stop: str | None = None
    if progress.step >= train.max_steps:
        run.note(
            f"nothing to train: the run is at step {progress.step}, train.max_steps is {train.max_steps}; raise it to "
            "go on, or choose another run.folder"
        )
    window = ProfilerWindow(run.folder, rank=run.mesh.rank, start=train.profile_step_start, end=train.profile_step_end)
    with ExitStack() as stack:
        stack.callback(window.close)
        for number in range(progress.step + 1, train.max_steps + 1):
            with watchdog.step(number):
                with window.step(number):
                    run.step(number)
                save_again = run.checkpoints.poll()
                if train.eval_interval and number % train.eval_interval == 0 and number < train.max_steps:
                    run.validate()
                stop = interrupt.should_stop()
                if stop:
                    run.note(f"{stop}: saving step {number}, then leaving")
                is_last = bool(stop) or number == train.max_steps
                if run.save_is_due() or is_last or save_again:
                    watchdog.progress()
                    run.save(is_last=is_last)
            if stop:
                break
    return stop


def _open_log(run: Run) -> MetricsLog:
    config = run.config
    return MetricsLog(
        run.folder,
        start_step=run.progress.step,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        log_interval=config.run.log_interval,
        total_steps=config.train.max_steps,
    )


def _write_summary(run: Run, summary: dict[str, Any]) -> None:
    path = run.folder / SUMMARY
    try:
        write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        # The checkpoint is saved, and the summary is shown.
        run.note(f"{path} can't be written: {error.strerror}")


def _open_folder(config: ResolvedConfig, held: ExitStack) -> None:
    """Take the run folder for this run, on rank 0, before anything in it changes. Collective."""
    folder = Path(config.run.folder)

    def take() -> None:
        check_run_folder(config)
        held.enter_context(sole_writer(folder, lambda line: print(line, flush=True)))

    _on_rank_zero(take, folder)


def _open_record(run: Run, held: ExitStack) -> None:
    """Write config.yaml and open the log on rank 0. Collective."""

    def write() -> None:
        write_config(run.config, run.folder / "config.yaml")
        run.log = held.enter_context(_open_log(run))

    _on_rank_zero(write, run.folder)


def _on_rank_zero(action: Callable[[], None], folder: Path) -> None:
    try:
        on_rank_zero(action)
    except OSError as error:
        raise ValueError(f"run.folder = {folder} can't be written: {refusal(error, folder)}") from error


def _run_to_the_end(config: ResolvedConfig, mesh: rank_grid.Mesh, interrupt: Interrupt) -> dict[str, Any]:
    timeout = config.parallel.distributed_timeout_seconds
    with ExitStack() as stack:
        with Watchdog(mesh.rank, timeout) as watchdog, watchdog.step(0):
            _open_folder(config, stack)
            run = Run(config, mesh)
            _open_record(run, stack)
        watchdog = stack.enter_context(Watchdog(mesh.rank, timeout))
        run.trainer.heartbeat = watchdog.progress
        try:
            interrupted = _train(run, watchdog, interrupt)
        except NonFiniteError:
            # All ranks are here: a checkpoint of a good step that is still being written is worth waiting for.
            try:
                run.checkpoints.wait()
            except CheckpointError as error:
                run.note(str(error))
            raise
        with watchdog.step(run.progress.step):
            validation_loss = None if interrupted else run.validate()
            summary = summarise(config, run.feed, asdict(run.progress), validation_loss, interrupted)
        if mesh.rank == 0:
            _write_summary(run, summary)
    return summary


def pretrain(config: ResolvedConfig) -> dict[str, Any]:
    """Train as ``config`` says, on every rank of the world that torchrun (or nobody) started.

    Args:
        config: its data paths filled in.

    Returns:
        The summary, the same on every rank: step, tokens, losses, baselines, and ``interrupted``, the name of the
        signal that ended the run early or None.

    Raises:
        CheckpointError: too many checkpoints in a row or the last one could not be written, or none of those there
            could be read.
        CollectiveError: a collective failed or timed out.
        ConversionError: the weights to start from could not be written as a checkpoint.
        NonFiniteError: too many steps in a row were not finite.
        ValueError: another process trains in the run folder, it can't be written or has files that no run wrote, or its
            checkpoint does not fit the configuration.
    """
    mesh = rank_grid.initialise(config.parallel, seed=config.train.seed)
    # Around all of it, so that a signal never finds a process that would just die of it.
    with Interrupt() as interrupt:
        try:
            return _run_to_the_end(config, mesh, interrupt)
        finally:
            rank_grid.shut_down()
