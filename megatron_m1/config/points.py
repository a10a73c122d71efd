"""Numbers that change with the tokens trained on, as points in lists: ``[tokens, value, tokens, value, ...]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import batched, pairwise


def on_lines(points: Sequence[float], tokens: int) -> float:
    """Return the value at ``tokens``: linear between the points, constant before the first and after the last."""
    pairs = list(batched(points, 2))
    for (start, before), (end, after) in pairwise(pairs):
        if start <= tokens < end:
            return before + (after - before) * (tokens - start) / (end - start)
    return pairs[0][1] if tokens < pairs[0][0] else pairs[-1][1]


def on_steps(points: Sequence[float], tokens: int) -> float:
    """Return the value at ``tokens``: each holds from its tokens on, and the first before them as well."""
    value = points[1]
    for start, held in batched(points, 2):
        if start <= tokens:
            value = held
    return value


def next_change(points: Sequence[float], tokens: int) -> float:
    """Return the tokens after ``tokens`` at which ``on_steps`` takes another point; infinite after the last."""
    return min((start for start in points[::2] if start > tokens), default=math.inf)


def check_points(name: str, points: Sequence[float], value: str, example: str) -> None:
    """Check that ``points`` are pairs of rising tokens and a value; an empty list is no schedule.

    Args:
        name: of the field.
        points: its value.
        value: what a point has besides its tokens, in a word.
        example: of such a list.

    Raises:
        ValueError: with one line that names the value and the fix.
    """
    if len(points) % 2:
        raise ValueError(f"{name} has {len(points)} numbers: give pairs of tokens and {value}, as {example}")
    if not all(math.isfinite(number) and number >= 0 for number in points):
        raise ValueError(f"{name} = {list(points)}: all numbers must be finite, and 0 or above")
    if any(b <= a for a, b in pairwise(points[::2])):
        raise ValueError(f"{name} = {list(points)}: the tokens of its points must rise")
