"""A run on Weights & Biases, or in its files for later (offline); the package is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_m1.config.tree import RunConfig
from megatron_m1.files import write_atomically
from megatron_m1.training.figures import Figure, Record

RUN_ID = "wandb_id"
"""File of the run folder that says which W&B run a resumed run goes on in."""


class Tracker:
    """One W&B run. What a field of ``run`` leaves open, W&B's own variables say (WANDB_MODE, WANDB_ENTITY, ...).

    Args:
        folder: the run's; W&B's files go to ``<folder>/wandb``.
        run: with a ``wandb_project``.
        settings: the configuration as nested dictionaries, shown with the run.

    Raises:
        ValueError: W&B refuses (no key, no network, a bad name); one line with the fix.
    """

    def __init__(self, folder: Path, run: RunConfig, settings: Mapping[str, Any]) -> None:
        # Imported where it is asked for; ``config.tracking`` has checked that it is there.
        import wandb

        path = folder / RUN_ID
        known = path.read_text(encoding="utf-8").strip() if path.exists() else None
        try:
            self._run = wandb.init(
                project=run.wandb_project,
                entity=run.wandb_entity,
                name=run.wandb_name,
                group=run.wandb_group,
                tags=run.wandb_tags or None,
                id=run.wandb_id or known,
                resume="allow",
                mode=run.wandb_mode,
                dir=str(folder),
                config=dict(settings),
                # It would stand between us and a standard output that may refuse.
                settings=wandb.Settings(console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"run.wandb_project = {run.wandb_project!r}: W&B refuses: {said}: put that right, or use "
                "run.wandb_mode offline, and wandb sync later"
            ) from error
        write_atomically(path, self._run.id.encode())
        self._drawn: set[Figure] = set()

    def add(self, step: int, record: Record) -> None:
        """Send the figures of ``step``, each drawn over its axis."""
        for figure in record.keys() - self._drawn:
            self._run.define_metric(figure.name, step_metric=figure.axis)
        self._drawn |= record.keys()
        # Not W&B's own step: that cannot go back when a run resumes from before its last record.
        self._run.log({"step": step, **{figure.name: value for figure, value in record.items() if value is not None}})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
