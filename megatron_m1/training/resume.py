"""Where a run begins: at its newest checkpoint, or at step 0 with weights drawn or given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.folder import CONFIG, STATE, folder_name
from megatron_m1.checkpoint.store import Checkpoints
from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.io import load_config
from megatron_m1.printing import shown
from megatron_m1.training.init_from import load_initial
from megatron_m1.training.trained_model import TrainedModel


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


def stored_progress(state: Mapping[str, Any]) -> Progress:
    """Read what a checkpoint's ``state.json`` says.

    Raises:
        ValueError: it has other names than a run's, or a value that is no count.
    """
    names = {field.name for field in fields(Progress)}
    if state.keys() != names:
        odd = ", ".join(shown(name) for name in sorted(state.keys() ^ names)[:4])
        raise ValueError(f"{STATE} of the checkpoint lacks, or has besides what a run has: {odd}")
    for name, value in state.items():
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{STATE} of the checkpoint has {name} = {shown(value)}, which is no count")
    return Progress(**state)


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


def start_or_resume(
    trained: TrainedModel, checkpoints: Checkpoints, config: ResolvedConfig, note: Callable[[str], None]
) -> Progress:
    """Load the newest checkpoint, or else the weights that a new run starts from. Collective.

    Args:
        trained: new.
        checkpoints: of the run.
        config: of the run.
        note: shows a line to the user.
    """
    state = checkpoints.load_newest(trained) if config.run.resume else None
    if state is None:
        if config.run.init_from is not None:
            note(f"starting from the weights of {load_initial(trained, config, config.run.init_from)}")
        return Progress(train_samples=config.data.train_samples)
    progress = stored_progress(state)
    note(f"resumed from step {progress.step} ({progress.tokens:,} tokens)")
    if trained.mesh.rank == 0:
        _note_changes(config, progress.step, note)
    return progress


def _note_changes(config: Config, step: int, note: Callable[[str], None]) -> None:
    """Say what differs from the checkpoint that was loaded."""
    saved = load_config(Path(config.run.folder) / "checkpoints" / folder_name(step) / CONFIG)
    changes = changed_fields(saved, config)
    if changes:
        note("changed since that checkpoint: " + ", ".join(changes.values()))
    if STREAM_FIELDS & changes.keys():
        note("so the data are not the stream that would have come: packs are counted on, but cut anew")
