"""What SLURM's variables say of the processes to start.

Every node starts its own processes, so a node must have one task. Which variables count:

==================================  ===========================================================================
in a step (``SLURM_STEP_ID``)       nodes: ``SLURM_STEP_NUM_NODES``, else those of ``SLURM_STEP_TASKS_PER_NODE``,
                                    else ``SLURM_NNODES``. Tasks: ``SLURM_STEP_TASKS_PER_NODE``, else
                                    ``SLURM_STEP_NUM_TASKS``, else ``SLURM_NTASKS_PER_NODE``, else
                                    ``SLURM_NTASKS``. Rank of the node: ``SLURM_NODEID``, counted within the step.
                                    First node: of ``SLURM_STEP_NODELIST``, else of the job's list
in a batch script, no step          it runs on the first node alone: more nodes need srun
several tasks on a node             refused: each would train by itself in the same folder
fewer tasks than nodes              refused: the nodes without one would be waited for
heterogeneous job                   each component counts its own nodes: refused
``NNODES`` and ``NODE_RANK``        of several nodes, together, overrule all of this
GPUs of the node                    ``SLURM_GPUS_ON_NODE``, but no more than the task sees (``--gpus-per-task``)
port                                from ``SLURM_JOB_ID`` and ``SLURM_STEP_ID``: steps run side by side
==================================  ===========================================================================

The variables of the job describe the job's request also in an interactive step, which is one task of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_m1.printing import counted

ONE_TASK = "use srun --ntasks-per-node=1, each task starts its node's processes"


@dataclass(frozen=True)
class SlurmStep:
    """The nodes on which this process's like were started."""

    nodes: int
    node_rank: int
    first_node: str
    """Name of node 0; empty when nothing tells."""
    port: int
    """A port for the rendezvous, of this step's own as far as numbers reach."""


def number_of(environ: Mapping[str, str], name: str, *, minimum: int) -> int | None:
    """Return a variable as an integer; None when it is not set or empty.

    Raises:
        ValueError: it is none, or below ``minimum``.
    """
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < minimum:
        raise ValueError(f"environment variable {name} = {text!r}: give an integer of at least {minimum}")
    return int(text)


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list, e.g. ``gpu[07-12,20],cpu1`` -> ``gpu07``."""
    depth = 0
    for end, character in enumerate(node_list):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            node_list = node_list[:end]
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of every node, e.g. ``2(x3),1`` -> [2, 2, 2, 1].

    Raises:
        ValueError: SLURM writes no such thing.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\(x([0-9]{1,6})\))?\s*", part)
        if match is None:
            raise ValueError(f"environment variable SLURM_STEP_TASKS_PER_NODE = {text!r}: SLURM writes 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def read_step(environ: Mapping[str, str]) -> SlurmStep | None:
    """Read SLURM's variables; None outside of its jobs, and in one whose only node runs a batch script.

    Raises:
        ValueError: a node has several tasks, the job is heterogeneous or has nodes on which nothing would start, or a
            variable is no number.
    """
    in_step = bool(environ.get("SLURM_STEP_ID", "").strip())
    if (number_of(environ, "SLURM_HET_SIZE", minimum=0) or 1) > 1:
        raise ValueError(
            "a heterogeneous SLURM job (SLURM_HET_SIZE) counts the nodes of each component by itself: give every node "
            "NNODES, NODE_RANK and MASTER_ADDR, or unset SLURM_HET_SIZE to start one component alone"
        )
    if not in_step:
        nodes = _first_number(environ, "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
        if nodes > 1:
            raise ValueError(
                f"SLURM gives this job {nodes} nodes, but a batch script runs on the first alone: start it by srun"
            )
        return None
    nodes = _check_tasks(environ)
    job, step = number_of(environ, "SLURM_JOB_ID", minimum=0), number_of(environ, "SLURM_STEP_ID", minimum=0)
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return SlurmStep(
        nodes=nodes,
        node_rank=number_of(environ, "SLURM_NODEID", minimum=0) or 0,
        first_node=first_host(next((environ[name] for name in lists if environ.get(name)), "")),
        # Steps of one job run side by side, and jobs on the same nodes have neighbouring numbers.
        port=29_500 if job is None else 20_000 + (job + 101 * (step or 0)) % 20_000,
    )


def _check_tasks(environ: Mapping[str, str]) -> int:
    """Return the number of nodes of a step, each of which has one task."""
    by_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "").strip()
    counts = tasks_per_node(by_node) if by_node else []
    nodes = number_of(environ, "SLURM_STEP_NUM_NODES", minimum=1) or len(counts)
    nodes = nodes or _first_number(environ, "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    tasks = number_of(environ, "SLURM_STEP_NUM_TASKS", minimum=1)
    if counts:
        most = max(counts)
    elif tasks is not None:
        most = -(-tasks // nodes)
    else:
        most = number_of(environ, "SLURM_NTASKS_PER_NODE", minimum=1) or 0
        most = most or -(-(number_of(environ, "SLURM_NTASKS", minimum=1) or 1) // nodes)
    most = max(most, 1 + (number_of(environ, "SLURM_LOCALID", minimum=0) or 0))
    if most > 1:
        raise ValueError(f"SLURM starts {most} tasks a node: {ONE_TASK}")
    if (sum(counts) or tasks or nodes) < nodes:
        raise ValueError(f"SLURM starts {counted(sum(counts) or tasks or 0, 'task')} on {nodes} nodes: {ONE_TASK}")
    return nodes


def _first_number(environ: Mapping[str, str], *names: str) -> int | None:
    return next((value for name in names if (value := number_of(environ, name, minimum=1)) is not None), None)
