"""Whole runs of a very small model, and what the tests of the loop ask of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from megatron_m1 import cli
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.runtime import mesh
from megatron_m1.training.loop import open_trainer, pretrain
from megatron_m1.training.steps_guard import NonFiniteError
from megatron_m1.training.trainer import Trainer

STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "model": dict(
        num_layers=4,
        mixers=["lightning", "softmax"],
        hidden_size=32,
        num_attention_heads=2,
        kv_channels=16,
        num_query_groups=2,
        moe_ffn_hidden_size=24,
        num_moe_experts=4,
        vocab_size=504,
    ),
    "data": dict(seq_length=64),
    "optimizer": dict(lr=3e-3, lr_warmup_tokens=512),
    "train": dict(max_steps=STEPS, global_batch_size=4, eval_interval=2, eval_samples=4),
    "run": dict(save_interval=3, keep_checkpoints=0, tensorboard=False),
}
EXACT = ("tokens", "loss", "aux_loss", "grad_norm", "lr", "skipped_steps")
"""What a resumed run repeats bit for bit; the other fields of a record are timings."""
Setting = tuple[str, Any]


def write_settings(path: Path, corpus: dict[str, Any], folder: Path, *settings: Setting) -> Path:
    """Write the YAML of a run in ``folder``; each setting is ``("group.field", value)``."""
    tree: dict[str, dict[str, Any]] = copy.deepcopy(SETTINGS) | {"parallel": {}}
    tree["data"] |= corpus
    tree["run"]["folder"] = str(folder)
    for name, value in settings:
        group, field = name.split(".")
        tree[group][field] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def train(rank: int, world_size: int, settings: Path) -> dict[str, Any]:
    """Run the loop as the console command does."""
    return trained(config_of(settings, world_size))


def trained(config: ResolvedConfig) -> dict[str, Any]:
    """The summary of a run that has something to train."""
    summary = pretrain(config)
    assert summary is not None
    return summary


def train_nothing(rank: int, world_size: int, settings: Path) -> dict[str, Any] | None:
    """Run the loop of a run that may have nothing to train."""
    return pretrain(config_of(settings, world_size))


def command(rank: int, world_size: int, words: list[str], folder: Path | None = None) -> tuple[int, str]:
    """Run the console command as one of torchrun's workers, in a directory; its status and what it prints."""
    with contextlib.ExitStack() as held:
        if folder is not None:
            held.enter_context(contextlib.chdir(folder))
        printed = held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        status = cli.run(words)
    return status, printed.getvalue()


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in (folder, *folder.rglob("*"))
    }


def train_with_variables(
    rank: int, world_size: int, settings: Path, variables: dict[str, str]
) -> dict[str, Any] | None:
    """Run the loop with some environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        return pretrain(config_of(settings, world_size))
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_on_a_known_device(rank: int, world_size: int, settings: Path, peak_flops: float) -> None:
    """One step, a save and a validation of a device of so many FLOP/s at most."""
    config = config_of(settings, world_size)
    grid = mesh.initialise(config.parallel, seed=config.train.seed)
    with ExitStack() as held:
        trainer = open_trainer(config, grid, held, console=Console(file=io.StringIO()))
        assert trainer is not None
        trainer.peak_flops = peak_flops
        for number in (1, 2):
            trainer.step(number)
            trainer.save()
        trainer.validate()


def config_of(settings: Path, world_size: int) -> ResolvedConfig:
    """The configuration of a run, as one of the processes has it."""
    return resolve(parse_config([str(settings)], []), world_size, has_gpu=False)


def records(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trace(folder: Path) -> list[tuple[Any, ...]]:
    """What must not differ from another run of the same mesh: exact figures of all steps, and the validations."""
    return [(line["step"], *(line.get(name) for name in (*EXACT, "validation_loss"))) for line in records(folder)]


def steps_recorded(folder: Path) -> int:
    """Training steps in metrics.jsonl, torn or missing as it may be."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@contextmanager
def once(condition: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Watch for ``condition`` from another thread while the body runs; do ``action`` as soon as it holds."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            if condition():
                action()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def train_until_killed(rank: int, world_size: int, settings: Path, step: int) -> None:
    """Die of SIGKILL while the checkpoint of ``step`` is being written."""
    config = config_of(settings, world_size)
    unfinished = Path(config.run.folder) / "checkpoints" / f"step_{step:08d}.tmp"
    with once(unfinished.exists, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        pretrain(config)


def train_with_a_full_disk(rank: int, world_size: int, settings: Path, step: int) -> dict[str, Any]:
    """Train while rank 0's disk takes no file of a checkpoint's size until more than ``step`` steps are recorded."""
    config = config_of(settings, world_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with once(lambda: steps_recorded(Path(config.run.folder)) > step, make_room):
            return trained(config)
    finally:
        make_room()


def train_in_a_taken_folder(rank: int, world_size: int, settings: Path) -> str:
    """The error of every rank when another process has the run folder."""
    try:
        pretrain(config_of(settings, world_size))
    except ValueError as error:
        return str(error)
    return "trained"


def train_until_signal(rank: int, world_size: int, settings: Path, number: signal.Signals, to: int) -> dict[str, Any]:
    """Send ``number`` to rank ``to`` alone, after some steps."""
    config = config_of(settings, world_size)
    folder = Path(config.run.folder)
    with once(lambda: rank == to and steps_recorded(folder) > 3, lambda: os.kill(os.getpid(), number)):
        return trained(config)


def train_until_not_finite(rank: int, world_size: int, settings: Path) -> str:
    """The message with which the run ends."""
    try:
        pretrain(config_of(settings, world_size))
    except NonFiniteError as error:
        return str(error)
    return "came to its end"


def _snapshot(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all that an optimizer step changes: parameters, their fp32 shards, both moments, the step counts."""
    tensors = [p.detach().clone() for chunk in trainer.trained.chunks for p in chunk.parameters()]
    for part in trainer.trained.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors.append(torch.tensor(group.get("step", 0)))
        for state in part.optimizer.state.values():
            tensors += [value.detach().clone() for value in state.values() if torch.is_tensor(value)]
    return tensors


def _same(trainer: Trainer, before: list[torch.Tensor]) -> bool:
    now = _snapshot(trainer)
    return len(now) == len(before) and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def poison_one_gradient(rank: int, world_size: int, settings: Path, value: float) -> dict[str, Any]:
    """Four steps; in the third, one element of one gradient on the last rank alone is ``value``."""
    config = config_of(settings, world_size)
    grid = mesh.initialise(config.parallel, seed=config.train.seed)
    with ExitStack() as held:
        trainer = open_trainer(config, grid, held, console=Console(file=io.StringIO()))
        assert trainer is not None
        return _poison(trainer, value)


def _poison(trainer: Trainer, value: float) -> dict[str, Any]:
    for number in (1, 2):
        trainer.step(number)
    before = _snapshot(trainer)
    hook = None
    if trainer.trained.mesh.rank == trainer.trained.mesh.world_size - 1:
        weight = next(trainer.trained.chunks[0].parameters())

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
            return gradient

        hook = weight.register_hook(poison)
    skipped = trainer.step(3)
    unchanged = _same(trainer, before)
    counts = (trainer.progress.skipped_total, trainer.progress.skipped_in_row)
    if hook is not None:
        hook.remove()
    good = trainer.step(4)
    return {
        "updated": (skipped.updated, good.updated),
        "unchanged": (unchanged, _same(trainer, before)),
        "counts": (counts, (trainer.progress.skipped_total, trainer.progress.skipped_in_row)),
        "next_loss": good.loss,
    }


def wait_for(condition: Callable[[], bool], process_ended: Callable[[], bool], *, seconds: float) -> None:
    """Wait for ``condition`` of a run in another process.

    Raises:
        AssertionError: the process has ended, or ``seconds`` have passed, without it.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert not process_ended(), "the run ended too early"
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.005)


def digest(path: Path) -> str:
    """sha256 of a file, as a checkpoint's manifest has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
