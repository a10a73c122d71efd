"""From a command line to the processes that run it: what training and evaluation share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_m1.launch import Launch
from megatron_m1.printing import counted


def is_first_rank() -> bool:
    """Whether this process is the one that prints, under torchrun or by itself."""
    return os.environ.get("RANK", "0") == "0"


def check_gpus(gpus: int, launch: Launch | None) -> None:
    """Check that every process of this node has a GPU, where there are any.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    local = launch.processes_per_node if launch else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local:
        raise ValueError(
            f"{local} processes on this node, but it has {counted(gpus, 'GPU')}: start at most {gpus} (GPUS_PER_NODE)"
        )


def without_launch_options(arguments: Sequence[str]) -> list[str]:
    """Drop ``--nproc-per-node``: the workers must not see it."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--nproc-per-node":
            rest.pop(0)
        elif not word.startswith("--nproc-per-node="):
            kept.append(word)
    return kept
