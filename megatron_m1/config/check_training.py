"""Checks of how a run trains: its optimizer, its schedules and its stages' learning rates."""

from __future__ import annotations

import math
from itertools import pairwise

from megatron_m1.config.epochs import epoch_caps
from megatron_m1.config.lr import parse_segments
from megatron_m1.config.numeric import check_not_negative, check_positive
from megatron_m1.config.points import check_points
from megatron_m1.config.schedules import Schedules
from megatron_m1.config.stages import LR, Stage, stages_of
from megatron_m1.config.tracking import check_tracking
from megatron_m1.config.tree import Config, OptimizerConfig, TrainConfig

ALIKE = 1e-6
"""Relative difference up to which two learning rates are the same: people round what they write."""


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Check AdamW's numbers and the schedule's.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    check_positive("optimizer", optimizer, ["lr", "adam_eps"])
    numbers = [name for name, value in vars(optimizer).items() if isinstance(value, float)]
    spans = ["lr_warmup_tokens", "lr_warmup_steps", "lr_constant_tokens", "lr_decay_tokens"]
    check_not_negative("optimizer", optimizer, [*numbers, *spans])
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optimizer, name) >= 1:
            raise ValueError(f"optimizer.{name} = {getattr(optimizer, name)}: it must be below 1")
    check_points("optimizer.clip_grad_schedule", optimizer.clip_grad_schedule, "norm", "[0, 1, 1e12, 0.5]")
    if optimizer.lr_warmup_tokens and optimizer.lr_warmup_steps:
        raise ValueError(
            f"optimizer.lr_warmup_tokens = {optimizer.lr_warmup_tokens} and lr_warmup_steps = "
            f"{optimizer.lr_warmup_steps}: give one of them"
        )
    if optimizer.lr_segments:
        _check_segments(optimizer)
        return
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}: lower it")
    if optimizer.lr_decay_style == "exponential" and optimizer.lr_decay_tokens and optimizer.min_lr == 0:
        raise ValueError("optimizer.min_lr = 0 can't be reached by exponential decay: give it a value above 0")


def _check_segments(optimizer: OptimizerConfig) -> None:
    rate = optimizer.lr
    for segment in parse_segments(optimizer.lr_segments):
        if segment.shape == "exponential" and rate == 0:
            raise ValueError("optimizer.lr_segments has an exponential segment that begins at 0: begin it above 0")
        rate = segment.end
    for name in ("lr_constant_tokens", "lr_decay_tokens"):
        if getattr(optimizer, name):
            raise ValueError(
                f"optimizer.{name} = {getattr(optimizer, name)} and lr_segments both say what "
                "follows the warm-up: give one of them"
            )


def check_run(config: Config) -> None:
    """Check the loop's numbers and schedules, and those of checkpoints and records.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    train, run, data = config.train, config.run, config.data
    check_positive("train", train, ["max_steps", "max_skipped_steps"])
    check_not_negative("train", train, ["seed", "eval_interval", "eval_samples"])
    check_not_negative("data", data, ["train_transition_tokens"])
    epoch_caps(data)
    _check_schedules(config)
    _check_spike_guard(train)
    if train.loss_normalization == "sample" and not data.reset_at_documents:
        raise ValueError(
            "train.loss_normalization = sample with data.reset_at_documents = false would count a pack as one sample: "
            "set data.reset_at_documents: true, or train.loss_normalization: token"
        )
    if data.seq_length < 2:
        raise ValueError(f"data.seq_length = {data.seq_length}: a pack needs at least 2 tokens")
    check_positive("run", run, ["log_interval", "max_failed_saves"])
    check_not_negative("run", run, ["save_interval", "save_interval_minutes", "keep_checkpoints"])
    check_positive("parallel", config.parallel, ["distributed_timeout_seconds"])
    start, end = train.profile_step_start, train.profile_step_end
    if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start < end):
        raise ValueError(
            f"train.profile_step_start = {start} and profile_step_end = {end}: give both, the start below the end"
        )
    if not run.folder:
        raise ValueError("run.folder is empty: give the folder of the run")
    if data.cache_folder == "":
        raise ValueError("data.cache_folder is empty: give a folder, or null for the run's own")
    check_tracking(run)


def _check_spike_guard(train: TrainConfig) -> None:
    check_not_negative("train", train, ["grad_norm_interval", "max_spikes"])
    if not (train.spike_factor > 1 and math.isfinite(train.spike_factor)):
        raise ValueError(f"train.spike_factor = {train.spike_factor}: it must be a finite number above 1")
    if train.spike_window < 2:
        raise ValueError(f"train.spike_window = {train.spike_window}: a median needs at least 2 steps")
    if train.spike_guard == "rollback" and not train.max_spikes:
        raise ValueError("train.max_spikes = 0 with train.spike_guard rollback might go back for ever: give 1 or more")


def _check_schedules(config: Config) -> None:
    train = config.train
    name, points = "train.moe_aux_loss_coeff_schedule", train.moe_aux_loss_coeff_schedule
    check_points(name, points, "weight", "[0, 0.01, 1e12, 0.001]")
    if points and config.model.moe_router_load_balancing_type == "none":
        raise ValueError(f"{name} is given, but model.moe_router_load_balancing_type is none: leave one of them out")
    name, points = "train.global_batch_size_schedule", train.global_batch_size_schedule
    check_points(name, points, "packs", "[0, 2048, 69e9, 4096]")
    packs = next((packs for packs in points[1::2] if packs < 1 or packs != int(packs)), None)
    if packs is not None:
        raise ValueError(f"{name} has a batch of {packs:g} packs: give a whole number above 0")


def check_rates(config: Config) -> None:
    """Check that no stage of a run begins with another learning rate than the one before ends with, unless it says so.

    Raises:
        ValueError: one does; one line with both rates and the fix.
    """
    stages = tuple(stages_of(config))
    starts = {stage.name: stage.nominal_start for stage in stages}
    for before, stage in pairwise(stages):
        if stage.origins[LR] != stage.index or stage.config.optimizer.lr_may_jump:
            continue
        begin = starts[stage.name]
        last, first = (Schedules(stages, index, starts).learning_rate(begin) for index in (before.index, stage.index))
        if not math.isclose(last, first, rel_tol=ALIKE):
            raise ValueError(_jump(before, last, stage, first))


def _jump(before: Stage, last: float, stage: Stage, first: float) -> str:
    optimizer = stage.config.optimizer
    warms_up = optimizer.lr_warmup_tokens or optimizer.lr_warmup_steps
    return (
        f"stage {stage.name} begins with the learning rate {first:g}{', its warm-up,' if warms_up else ''} and stage "
        f"{before.name} ends with {last:g}: let its schedule begin with that one (optimizer.lr {last:g}), or say there "
        "optimizer.lr_may_jump: true"
    )
