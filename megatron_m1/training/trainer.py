"""What trains: a global batch into the model, its figures into the record, the state into a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from megatron_m1.checkpoint.folder import folder_name
from megatron_m1.checkpoint.store import CheckpointError, Checkpoints
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.schedules import Span
from megatron_m1.plan.flops import peak_bf16_flops
from megatron_m1.printing import counted
from megatron_m1.runtime.interrupt import any_rank
from megatron_m1.training.aux_coefficient import balancing_figures, set_aux_loss_coefficient
from megatron_m1.training.feed import Feed, useful_flops
from megatron_m1.training.figures import Figure
from megatron_m1.training.gradient_watch import SPIKES, GradientWatch
from megatron_m1.training.metrics import MetricsLog
from megatron_m1.training.optimizer import set_clip_grad
from megatron_m1.training.progress import Progress, stored_progress
from megatron_m1.training.resources import FORWARD_BACKWARD_SECONDS, OPTIMIZER_SECONDS, SAVE_SECONDS, Taken, share
from megatron_m1.training.rollback import STAYS, write_record
from megatron_m1.training.step import GRAD_NORM, StepResult, evaluate, train_step
from megatron_m1.training.steps_guard import StepsGuard
from megatron_m1.training.trained_model import TrainedModel

STAGE = Figure("stage", "stage {}", importance=1)
"""Number of the stage, from 1; only in runs with stages."""
TOKENS = Figure("tokens", "tokens {}", is_count=True, short="{} tok", importance=2)
"""Of the run so far."""
LR = Figure("lr", "lr {:.2e}", short="lr {:.1e}", importance=5)
TOKENS_PER_SECOND = Figure("tokens_per_second", "{} tokens/s", is_count=True, short="{} tok/s", importance=8)
TFLOPS = Figure("model_tflops_per_device", "{:.3g} TFLOP/s per device", short="{:.3g} TF/s", importance=1)
"""Useful ones, see ``plan.flops``."""
MFU = Figure("mfu", "MFU {:.1%}", importance=6)
"""Model FLOPs utilisation: useful FLOPs over the device's dense bf16 peak, where that is known."""
SKIPPED_STEPS = Figure("skipped_steps", "skipped {}", hides_zero=True, importance=8)
"""Of the run so far."""
VALIDATION_LOSS = Figure("validation_loss", "validation loss {:.4f}", importance=9)
"""Over the held-out packs."""


@dataclass
class Trainer:
    """One process's share of a run, between the start (or resume) and the end."""

    config: ResolvedConfig
    """Of the stage."""
    trained: TrainedModel
    checkpoints: Checkpoints
    feed: Feed
    progress: Progress
    span: Span
    """What is left of the stage."""
    note: Callable[[str], None]
    """Shows a line on rank 0's console."""
    log: MetricsLog | None = None
    """Rank 0's."""
    guard: StepsGuard = field(init=False)
    watch: GradientWatch = field(init=False)
    last_save: float = field(init=False)
    """By the monotonic clock; the start counts as one."""
    step_tokens: int = field(init=False, default=0)
    """Of the last step, without what pads the packs' ends."""
    save_seconds: float = field(init=False, default=0.0)
    """Of the checkpoints since the last record."""
    memory_peaks: list[float] = field(init=False, default_factory=list)
    """Of every rank in GiB, as of the last step."""
    peak_flops: float | None = field(init=False)
    """Of the device, per second; None on a CPU and on a GPU that is not in the list."""

    def __post_init__(self) -> None:
        device = self.trained.mesh.device
        self.peak_flops = peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.guard = StepsGuard(self.config.train.max_skipped_steps)
        self.guard.load_state_dict({"total": self.progress.skipped_total, "in_row": self.progress.skipped_in_row})
        self.watch = GradientWatch(self.config, self.trained, self.note)
        self.watch.guard.load_state_dict(self.progress.spike_guard)
        self.last_save = time.monotonic()

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.folder)

    def step(self, number: int) -> StepResult:
        """Train on the next global batch and record it.

        Raises:
            NonFiniteError: one step too many in a row was not finite; it is recorded as well.
            SpikeError: its gradient norm was a spike with which the run ends; it is recorded as well.
        """
        config, progress = self.config, self.progress
        began = time.perf_counter()
        schedules = self.span.schedules
        packs = schedules.packs(progress.tokens)
        plans = self.feed.take(packs, tokens=progress.tokens)
        samples = self.feed.read(plans)
        data_seconds = time.perf_counter() - began
        self.step_tokens = packs * config.data.seq_length
        reached = progress.tokens + self.step_tokens
        lr = schedules.learning_rate(reached)
        set_aux_loss_coefficient(self.trained, schedules.aux_loss_coefficient(reached))
        set_clip_grad(self.trained.optimizer, schedules.clip_grad(reached))
        result = train_step(self.trained, samples, lr, self.watch.of_step(number))
        progress.step = number
        progress.tokens = reached
        progress.consumed_samples += packs
        # Waits for the device as well: what the optimizer has queued there is done then.
        taken = share(self.trained.mesh, useful_flops(config, samples), data_seconds)
        seconds = time.perf_counter() - began
        self.memory_peaks = taken.memory
        parts = {
            FORWARD_BACKWARD_SECONDS: result.forward_backward_seconds,
            OPTIMIZER_SECONDS: seconds - data_seconds - result.forward_backward_seconds,
            SAVE_SECONDS: self.save_seconds,
        }
        self.save_seconds = 0.0
        self.watch.tell(samples, lambda: [plan.pieces for plan in plans])
        try:
            self.guard.record(number, result.loss, result.figures[GRAD_NORM])
            self.watch.check()
        finally:
            progress.skipped_total, progress.skipped_in_row = self.guard.total, self.guard.in_row
            progress.spike_guard = self.watch.guard.state_dict()
            self._record(result, lr, taken, seconds, parts)
        return result

    def _record(self, result: StepResult, lr: float, taken: Taken, seconds: float, parts: dict[Figure, float]) -> None:
        if self.log is None:
            return
        is_scheduled = bool(self.config.train.moe_aux_loss_coeff_schedule)
        achieved = taken.flops / seconds / self.trained.mesh.world_size
        record = {
            **({STAGE: self.span.stage.index + 1} if self.config.recipe.stages else {}),
            TOKENS: self.progress.tokens,
            **balancing_figures(self.trained, result.figures, is_scheduled=is_scheduled),
            LR: lr,
            TOKENS_PER_SECOND: self.step_tokens / seconds,
            TFLOPS: achieved / 1e12,
            **({MFU: achieved / self.peak_flops} if self.peak_flops is not None else {}),
            **result.routing,
            SKIPPED_STEPS: self.progress.skipped_total,
            SPIKES: self.watch.guard.total,
            **taken.figures,
            **parts,
            **self.watch.norms,
        }
        self.log.log_step(self.progress.step, record)

    def go_back(self) -> bool:
        """Load the newest checkpoint, if the last step asks for it, with the data behind that step's batch. Collective.

        Steps, tokens and learning rate go on from the checkpoint's: batches that are left out were not trained on.

        Returns:
            Whether the run is at that checkpoint now; there may be none.

        Raises:
            CheckpointError: all checkpoints are damaged, or those since this stage began.
        """
        if not self.watch.goes_back:
            return False
        self.checkpoints.wait()
        self.trained.heartbeat()
        self.progress.stream = self.feed.stream.state()
        state, now = self.checkpoints.load_newest(self.trained), asdict(self.progress)
        if state is None:
            self.note(f"step {self.progress.step}: there is no checkpoint to go back to; the step is skipped")
            return False
        stored = stored_progress(state)
        stage, begun = list(self.progress.stages.items())[-1]
        if stored.tokens < begun:
            raise CheckpointError(
                f"{folder_name(stored.step)}, the newest checkpoint that can be read, is in a stage before {stage}: "
                "start the run again, which goes on from there"
            )
        self.watch.guard.go_back(stored.spike_guard)
        kept = {name: now[name] for name in STAYS} | {"spike_guard": self.watch.guard.state_dict()}
        self.progress = replace(stored, **kept)
        self.guard.load_state_dict({"total": self.progress.skipped_total, "in_row": self.progress.skipped_in_row})
        if self.log is not None:
            write_record(self.folder / "checkpoints", asdict(self.progress), self.note)
            self.log.go_back(self.progress.step)
        packs = counted(now["consumed_samples"] - stored.consumed_samples, "pack")
        self.note(f"went back to {folder_name(stored.step)}; the data go on behind the spike, {packs} later")
        return True

    def validate(self) -> float | None:
        """Loss over the held-out packs in nats per token; None without any."""
        packs = self.feed.held_out_share()
        if not packs:
            return None
        loss = evaluate(self.trained, packs).loss
        if self.log is not None:
            self.log.log_validation(self.progress.step, {VALIDATION_LOSS: loss})
        return loss

    def save(self, *, is_last: bool = False) -> None:
        """Write a checkpoint of the current step (collective).

        Raises:
            CheckpointError: it can't be written, and training can't go on without it.
        """
        began = time.monotonic()
        self.progress.stream = self.feed.stream.state()
        is_written = self.checkpoints.save(self.trained, asdict(self.progress), is_last=is_last)
        self.last_save = time.monotonic()
        self.save_seconds += self.last_save - began
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
