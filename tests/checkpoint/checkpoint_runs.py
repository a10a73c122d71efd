"""What the checkpoint tests run on every rank, and a run that is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.checkpoint.store import CheckpointError, Checkpoints, load_model
from megatron_m1.config import Config
from megatron_m1.config.resolve import resolve
from megatron_m1.training.step import GRAD_NORM, train_step
from megatron_m1.training.trained_model import TrainedModel, build_trained_model
from tests.model import meshes
from tests.model.meshes import global_name, my_share, packs, start

LR = 3e-3


@dataclass
class Trace:
    """What one rank saw."""

    figures: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of each step."""
    prints: dict[str, str] = field(default_factory=dict)
    """Hash of every parameter's and optimizer state's bytes, by name."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None


def run_config(parallel: dict[str, Any], train: dict[str, Any] | None = None, **model: Any) -> Config:
    """The mesh tests' configuration with four layers, two of each kind."""
    values: dict[str, Any] = {"num_layers": 4, "mixers": ["lightning", "softmax"]}
    return meshes.run_config(parallel, train, **(values | model))


def open_checkpoints(
    folder: Path,
    config: Config,
    *,
    keep: int = 2,
    background: bool = False,
    notes: list[str] | None = None,
    max_failures: int = 1,
) -> Checkpoints:
    """Checkpoints whose notes go to a list."""
    return Checkpoints(
        folder,
        keep=keep,
        async_save=background,
        config=config,
        note=(notes if notes is not None else []).append,
        max_failures=max_failures,
    )


def state_at(step: int) -> dict[str, Any]:
    """What the loop would keep besides tensors."""
    return {"step": step, "tokens": 192 * step, "consumed_samples": 4 * step}


def one_step(trained: TrainedModel, step: int) -> tuple[float, float]:
    """Train on the global batch of ``step``."""
    result = train_step(trained, my_share(trained, packs(step)), lr=LR)
    assert result.updated
    return result.loss, result.figures[GRAD_NORM]


def fingerprints(trained: TrainedModel) -> dict[str, str]:
    """Hash of every tensor that training changes, on this rank, and the optimizer's step counts."""
    prints = {}
    for index, chunk in enumerate(trained.chunks):
        for name, parameter in chunk.named_parameters():
            prints[f"{index}.{name}"] = _hash(parameter)
    for index, part in enumerate(trained.optimizer.chained_optimizers):
        for group_index, group in enumerate(part.optimizer.param_groups):
            prints[f"optimizer.{index}.{group_index}.step"] = str(group["step"])
            for order, parameter in enumerate(group["params"]):
                for kind, value in {"main": parameter, **part.optimizer.state[parameter]}.items():
                    prints[f"optimizer.{index}.{group_index}.{order}.{kind}"] = _hash(value)
    return prints


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def save_while_training(
    rank: int, world_size: int, config: Config, folder: Path, steps: int, saves: list[int], background: bool = False
) -> Trace:
    """Train ``steps`` steps and save after those of ``saves``."""
    trained = start(config, world_size)
    checkpoints = open_checkpoints(folder, config, background=background)
    trace = Trace()
    for step in range(steps):
        if step in saves:
            checkpoints.save(trained, state_at(step))
        trace.figures.append(one_step(trained, step))
        checkpoints.poll()
    if steps in saves:
        checkpoints.save(trained, state_at(steps))
    checkpoints.wait()
    trace.prints = fingerprints(trained)
    return trace


def resume(rank: int, world_size: int, config: Config, folder: Path, steps: int) -> Trace:
    """Load the newest checkpoint and train on to ``steps``."""
    trained = start(config, world_size)
    trace = Trace()
    trace.state = open_checkpoints(folder, config, notes=trace.notes).load_newest(trained)
    for step in range(trace.state["step"] if trace.state else 0, steps):
        trace.figures.append(one_step(trained, step))
    trace.prints = fingerprints(trained)
    trace.dtypes = {
        global_name(trained, chunk, name): parameter.dtype
        for chunk in trained.chunks
        for name, parameter in chunk.named_parameters()
    }
    return trace


def poisoned_background_save(rank: int, world_size: int, config: Config, folder: Path) -> None:
    """Begin to save in the background and overwrite everything at once, as fast training would."""
    trained = start(config, world_size)
    one_step(trained, 0)
    checkpoints = open_checkpoints(folder, config, background=True)
    checkpoints.save(trained, state_at(1))
    with torch.no_grad():
        for chunk in trained.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
        for part in trained.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["exp_avg"].fill_(float("nan"))
                state["exp_avg_sq"].fill_(float("nan"))
    checkpoints.wait()


def save_and_rotate(rank: int, world_size: int, config: Config, folder: Path, keep: int) -> list[list[str]]:
    """Save at steps 1 to 4; what the folder held after each."""
    trained = start(config, world_size)
    checkpoints = open_checkpoints(folder, config, keep=keep)
    held = []
    for step in range(1, 5):
        one_step(trained, step - 1)
        checkpoints.save(trained, state_at(step))
        held.append(sorted(os.listdir(folder)))
    return held


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing_save(rank: int, world_size: int, config: Config, folder: Path, limit: int) -> str:
    """Save, then fail to; the error's message. A third save works."""
    trained = start(config, world_size)
    checkpoints = open_checkpoints(folder, config)
    one_step(trained, 0)
    checkpoints.save(trained, state_at(1))
    one_step(trained, 1)
    message = ""
    with file_size_limit(limit):
        try:
            checkpoints.save(trained, state_at(2))
        except CheckpointError as error:
            message = str(error)
    one_step(trained, 2)
    checkpoints.save(trained, state_at(3))
    return message


def save_around_obstacles(
    rank: int, world_size: int, config: Config, folder: Path, obstacle: str
) -> tuple[list[bool], list[str], list[list[str]]]:
    """Save at step 1, begin to at step 2 and, when ``obstacle`` has failed that, at 3.

    Args:
        obstacle: where rank 0 puts a folder once the save of step 2 has begun, relative to ``folder``.

    Returns:
        Whether each save should be tried again, this rank's notes, and what lay in the folder after each save.
    """
    trained = start(config, world_size)
    notes: list[str] = []
    checkpoints = open_checkpoints(folder, config, keep=1, background=True, notes=notes, max_failures=2)
    again, held = [], []
    for step in (1, 2, 3):
        one_step(trained, step - 1)
        checkpoints.save(trained, state_at(step))
        if step == 2 and rank == 0:
            (folder / obstacle).mkdir()
        again.append(checkpoints.wait())
        held.append(sorted(os.listdir(folder)) if rank == 0 else [])
    return again, notes, held


def save_with_one_full_disk(
    rank: int, world_size: int, config: Config, folder: Path, background: bool
) -> tuple[list[str], str, list[str]]:
    """Save, then three times while the last rank can't write; the notes, the error and what is there at the end."""
    trained = start(config, world_size)
    notes: list[str] = []
    checkpoints = open_checkpoints(folder, config, keep=1, background=background, notes=notes, max_failures=3)
    one_step(trained, 0)
    assert checkpoints.save(trained, state_at(1))
    checkpoints.wait()
    error = ""
    with file_size_limit(20_000) if rank == world_size - 1 else contextlib.nullcontext():
        try:
            for step in range(2, 20):
                one_step(trained, step - 1)
                checkpoints.save(trained, state_at(step))
                checkpoints.wait()
        except CheckpointError as caught:
            error = str(caught)
    return notes, error, sorted(os.listdir(folder))


def last_save(rank: int, world_size: int, config: Config, folder: Path) -> tuple[list[str], list[str]]:
    """The last save of a run, on a disk that has room again only after some attempts; the notes, and what is there."""
    trained = start(config, world_size)
    notes: list[str] = []
    limit = contextlib.ExitStack()

    def note(line: str) -> None:
        notes.append(line)
        if len(notes) == 2:
            limit.close()

    checkpoints = Checkpoints(folder, keep=2, async_save=True, config=config, note=note)
    one_step(trained, 0)
    with limit:
        if rank == 0:
            limit.enter_context(file_size_limit(20_000))
        assert checkpoints.save(trained, state_at(1), is_last=True)
    return notes, sorted(os.listdir(folder))


def load_weights_only(rank: int, world_size: int, config: Config, checkpoint: Path) -> Trace:
    """Load a checkpoint's parameters into a new model and take two steps."""
    trained = start(config, world_size)
    load_model(trained, checkpoint)
    return Trace(figures=[one_step(trained, 0), one_step(trained, 1)], prints=fingerprints(trained))


def set_weights(rank: int, world_size: int, config: Config, source: Config, steps: int) -> Trace:
    """The reference of ``load_weights_only``: the parameters after ``steps`` steps, put in by hand."""
    trained = start(source, world_size)
    for step in range(steps):
        one_step(trained, step)
    fresh = build_trained_model(resolve(config, world_size, has_gpu=False), trained.mesh)
    for chunk, other in zip(fresh.chunks, trained.chunks, strict=True):
        for parameter, value in zip(chunk.parameters(), other.parameters(), strict=True):
            parameter.data.copy_(value)
    fresh.optimizer.reload_model_params()
    return Trace(figures=[one_step(fresh, 0), one_step(fresh, 1)], prints=fingerprints(fresh))


def save_for_ever(folder: Path) -> None:
    """One process that saves after every step, to be killed."""
    # As the workers do: sums over more threads are rounded otherwise.
    torch.set_num_threads(1)
    config = run_config({})
    trained = start(config, 1)
    checkpoints = open_checkpoints(folder, config)
    for step in range(10_000):
        one_step(trained, step)
        checkpoints.save(trained, state_at(step + 1))
