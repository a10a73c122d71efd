"""Sizes of files: read as users write them, and what fits together into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

_UNITS = {
    "": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}


def parse_size(text: str) -> int:
    """Read a size such as ``2GB``, ``500MiB`` or ``1000000``, in bytes.

    Raises:
        ValueError: it is none, or 0.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text.strip().lower())
    size = int(Decimal(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size == 0:
        raise ValueError(f"shard size {text!r}: give a number above 0 and one of KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    return size


def group_by_size[T](items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Cut ``items`` into runs of at most ``limit`` bytes; what is larger stands alone."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if not groups or size(item) > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size(item)
    return groups
