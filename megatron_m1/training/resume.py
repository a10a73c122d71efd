"""Where a run begins: at its newest checkpoint, or at step 0 with weights drawn or given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_m1.checkpoint.folder import CONFIG, folder_name
from megatron_m1.checkpoint.store import Checkpoints
from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.io import load_config
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
    progress = Progress(**state)
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
