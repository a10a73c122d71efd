"""What starts.jsonl says of a start: when the run, or a stage of it, began to train, where, and as what."""

from __future__ import annotations

from datetime import datetime
from importlib import metadata
from typing import Any

from megatron_m1.config.written import resolved_values
from megatron_m1.training.trainer import Trainer


def start_record(trainer: Trainer, *, same_processes: bool) -> dict[str, Any]:
    """Describe a start that goes on to train, as JSON-able values.

    Args:
        trainer: of the stage that begins or goes on.
        same_processes: whether the same processes have trained the stage before, so that this is no restart.
    """
    stage = trainer.span.stage.name if trainer.config.recipe.stages else None
    return {
        "step": trainer.progress.step,
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "world_size": trainer.trained.mesh.world_size,
        "version": metadata.version("megatron-m1"),
        "stage": stage,
        "same_processes": same_processes,
        # With the run's own tokenizer, as its files and checkpoints name it.
        "config": resolved_values(trainer.checkpoints.config, trainer.folder),
    }
