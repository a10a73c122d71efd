"""Packs for the tests of everything that cuts one: bounds of documents end to end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from hypothesis import strategies as st


def bounds_of(lengths: Sequence[int]) -> list[int]:
    """0, then each document's end."""
    return [0, *itertools.accumulate(lengths)]


def fill(lengths: Sequence[int], multiple: int) -> list[int]:
    """Bounds of these documents and of one more that fills up to a multiple, if it takes one."""
    rest = -sum(lengths) % multiple
    return bounds_of([*lengths, *([rest] if rest else [])])


def named_packs(tokens: int, ranks: int) -> dict[str, list[int]]:
    """The packs that sequence parallelism gets wrong most easily, each of ``tokens`` tokens in 2 x ``ranks`` segments.

    ``tokens`` is a multiple of 2 x ``ranks``, and at least 8 x ``ranks``.
    """
    half = tokens // (2 * ranks)
    draw = random.Random(f"{tokens} {ranks}")
    cuts = sorted(draw.sample(range(1, tokens), k=7))
    return {
        "one document over all ranks": [0, tokens],
        "documents of one token": [0, 1, 2, tokens - half - 1, tokens - half, tokens - half + 1, tokens - 1, tokens],
        "starts on every bound": [half * s for s in range(2 * ranks + 1)],
        "starts on some bounds": [0, half, 3 * half, tokens],
        "one token over a bound": [0, half + 1, 2 * half - 1, tokens - half + 1, tokens],
        "short ones only": [0, *range(3, tokens - 2, 3), tokens],
        "random": [0, *cuts, tokens],
        "long after short": [0, *range(2, tokens // 2, 2), tokens // 2, tokens],
    }


@st.composite
def packs_and_ranks(draw: st.DrawFn, least_ranks: int = 1, most_ranks: int = 64) -> tuple[list[int], int]:
    """Bounds of a random pack, and a number of ranks that divides its length."""
    ranks = draw(st.integers(least_ranks, most_ranks))
    short = st.lists(st.integers(1, 9), max_size=60)
    long = st.lists(st.integers(1, 150), max_size=4)
    lengths = [*draw(short), *draw(long), *draw(short)]
    # At least 2 tokens a rank.
    missing = max(0, 2 * ranks - sum(lengths))
    return fill([*lengths, *([missing] if missing else [])], ranks), ranks
