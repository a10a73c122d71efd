"""The standard tasks of lm-eval, as far as they can be looked at without torch."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m1.config.io import unknown
from megatron_m1.evaluation.plan import TasksPlan

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def check_tasks(plan: TasksPlan) -> None:
    """Check that lm-eval is there and knows the tasks.

    Raises:
        ValueError: it is not, or one is not known to it; one line.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval, which is not installed: pip install 'megatron-m1[eval]'")
    if plan.include_path is not None and not plan.include_path.is_dir():
        raise ValueError(f"--include-path {plan.include_path} is no folder: give one with task files (.yaml)")
    known = task_manager(plan.include_path).task_index
    for name in plan.names:
        if name not in known:
            raise unknown("task", name, list(known))


def task_manager(include_path: Path | None) -> TaskManager:
    """Return lm-eval's list of tasks, its own and those of a folder."""
    from lm_eval.tasks import TaskManager

    # Its lines about what it reads would bury ours.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=None if include_path is None else str(include_path))
