"""Where a run begins: at its newest checkpoint, or at step 0 with weights drawn or given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.folder import STATE, folder_name
from megatron_m1.checkpoint.store import Checkpoints
from megatron_m1.config import ResolvedConfig
from megatron_m1.printing import shown
from megatron_m1.training.changes import changes_since, stream_lines
from megatron_m1.training.init_from import load_initial
from megatron_m1.training.rollback import with_record
from megatron_m1.training.spike_guard import checked_state
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
    spike_guard: dict[str, Any] = field(default_factory=dict)
    """``SpikeGuard.state_dict``."""


def stored_progress(state: Mapping[str, Any]) -> Progress:
    """Read what a checkpoint's ``state.json`` says.

    Raises:
        ValueError: it has other names than a run's, or a value that is no count.
    """
    # Checkpoints of before there were guards have none.
    state = {"spike_guard": {}} | dict(state)
    names = {known.name for known in fields(Progress)}
    if state.keys() != names:
        odd = ", ".join(shown(name) for name in sorted(state.keys() ^ names)[:4])
        raise ValueError(f"{STATE} of the checkpoint lacks, or has besides what a run has: {odd}")
    try:
        checked_state(state["spike_guard"])
    except ValueError as error:
        raise ValueError(f"{STATE} of the checkpoint has spike_guard = {error}") from error
    for name, value in state.items():
        if name != "spike_guard" and (type(value) is not int or not 0 <= value < 1 << 63):
            raise ValueError(f"{STATE} of the checkpoint has {name} = {shown(value)}, which is no count")
    return Progress(**state)


def start_or_resume(
    trained: TrainedModel, checkpoints: Checkpoints, config: ResolvedConfig, note: Callable[[str], None]
) -> Progress:
    """Load the newest checkpoint, or else the weights that a new run starts from. Collective; writes no file of a run
    that goes on.

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
    return stored_progress(with_record(Path(config.run.folder) / "checkpoints", state))


def resume_lines(config: ResolvedConfig, progress: Progress) -> list[str]:
    """Say where a run goes on, and what differs from the checkpoint that was loaded; of a new run, nothing."""
    if not progress.step:
        return []
    checkpoint = Path(config.run.folder) / "checkpoints" / folder_name(progress.step)
    changes = changes_since(checkpoint, config)
    what = ["changed since that checkpoint: " + ", ".join(changes.values())] if changes else []
    return [f"resumed from step {progress.step} ({progress.tokens:,} tokens)", *what, *stream_lines(changes)]
