"""What a run tells Weights & Biases: its fields are checked here, once, before any process starts."""

from __future__ import annotations

import importlib.util

from megatron_m1.config.tree import RunConfig

WANDB_FIELDS = ("wandb_entity", "wandb_name", "wandb_group", "wandb_tags", "wandb_id", "wandb_mode")
"""Fields that mean nothing without ``run.wandb_project``."""


def check_tracking(run: RunConfig) -> None:
    """Check that what ``run`` asks of Weights & Biases can be done.

    Raises:
        ValueError: the package is missing, or a field is given without the project; one line with the fix.
    """
    if run.wandb_project is None:
        given = next((name for name in WANDB_FIELDS if getattr(run, name)), None)
        if given is not None:
            raise ValueError(f"run.{given} = {getattr(run, given)!r} without run.wandb_project: give the project, too")
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"run.wandb_project = {run.wandb_project!r}, but the wandb package is not installed: run pip install "
            "'megatron-m1[wandb]', or leave run.wandb_project out"
        )
