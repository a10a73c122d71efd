"""The standard tasks of lm-eval, as far as they can be looked at without torch."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from megatron_m1.config.fields import unknown
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
    known = task_manager(plan).task_index
    for name in plan.names:
        if name not in known:
            raise unknown("task", name, list(known))


def task_manager(plan: TasksPlan) -> TaskManager:
    """Return lm-eval's tasks: only those of the plan's folder if they are all that is asked for."""
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    # What they say of what they read would bury our lines.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    if plan.include_path is None:
        return TaskManager()
    folder = str(plan.include_path)
    # Its own are 14,000 files, which takes seconds; groups may be made of them.
    own = TaskManager(include_path=folder, include_defaults=False)
    return own if set(plan.names) <= set(own.all_subtasks) else TaskManager(include_path=folder)
