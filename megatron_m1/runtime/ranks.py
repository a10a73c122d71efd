"""What one rank does for all, so that all know how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed as dist


def on_rank_zero[T](action: Callable[[], T]) -> T:
    """Return on every rank what ``action`` returns on rank 0. Collective.

    Raises:
        OSError: it raised one; on every rank.
        ValueError: it raised one; on every rank.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def first_fault(fault: str | None) -> str | None:
    """Return on every rank the first rank's fault, None if none has one. Collective."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((fault for fault in faults if fault is not None), None)
