"""Models that belong to no mesh: they run in one process, beside each other and beside a run that trains there.

megatron-core keeps the groups of a process's one mesh in global variables; such a model has groups of its own instead,
which are in no registry, and whose collectives are never called because there is nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed as dist

_GROUPS = (
    "tp",
    "pp",
    "cp",
    "ep",
    "tp_cp",
    "tp_ep",
    "tp_dp_cp",
    "expt_tp",
    "expt_dp",
    "expt_dp_gtp_remat",
    "dp",
    "dp_cp",
    "dp_cp_gtp_remat",
)
"""What modules ask for. ``embd`` is left out: only tied embeddings have a group."""

_LOCK = threading.RLock()
"""Held while torch's default group may be one of ours: another thread would take it for the program's own."""


def groups_of_one() -> ProcessGroupCollection:
    """Return process groups in which this process is alone, whatever world it belongs to."""
    alone = dist.ProcessGroup(0, 1)
    return ProcessGroupCollection(**dict.fromkeys(_GROUPS, alone))


@contextmanager
def default_group() -> Iterator[None]:
    """Let modules with ``groups_of_one`` be built and called: megatron-core forgets them unless a world exists.

    Where torch.distributed is not running, a world of this one process runs for the length of the block, without a port
    or a file; where it is, nothing happens. Backward passes need no block.
    """
    with _LOCK:
        if dist.is_initialized():
            yield
            return
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
