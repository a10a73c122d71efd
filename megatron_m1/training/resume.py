"""Where a run begins: at its newest checkpoint, or at step 0 with weights drawn or given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_m1.checkpoint.folder import folder_name
from megatron_m1.checkpoint.store import Checkpoints
from megatron_m1.config import ResolvedConfig
from megatron_m1.training.changes import changes_since, stream_lines
from megatron_m1.training.init_from import load_initial
from megatron_m1.training.progress import Progress, stored_progress
from megatron_m1.training.rollback import with_record
from megatron_m1.training.trained_model import TrainedModel


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
        return Progress()
    progress = with_record(Path(config.run.folder) / "checkpoints", stored_progress(state))
    if progress.stream is None:
        note("its checkpoint is of an older version, which knew no stream of data: the data are begun anew")
    return progress


def resume_lines(config: ResolvedConfig, progress: Progress) -> list[str]:
    """Say where a run goes on, and what differs from the checkpoint that was loaded; of a new run, nothing."""
    if not progress.step:
        return []
    checkpoint = Path(config.run.folder) / "checkpoints" / folder_name(progress.step)
    changes = changes_since(checkpoint, config)
    if progress.begins_stage:
        name = list(progress.stages)[-1]
        return [f"stage {name} begins after step {progress.step} ({progress.tokens:,} tokens): {_listed(changes)}"]
    what = ["changed since that checkpoint: " + ", ".join(changes.values())] if changes else []
    return [f"resumed from step {progress.step} ({progress.tokens:,} tokens)", *what, *stream_lines(changes)]


def _listed(changes: dict[str, str]) -> str:
    return ", ".join(changes.values()) or "nothing changes"
