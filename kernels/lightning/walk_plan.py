"""How a pack is cut into segments that programs walk on their own, each within one document."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1
"""In place of the row of a state that is zero or not kept."""


class Segment(NamedTuple):
    """Consecutive tokens of one document, and where its states are: rows, or ``NONE``. The kernels read such tables."""

    start: int
    length: int
    state_in: int = NONE
    """Of the caller's states, walked from."""
    carry_in: int = NONE
    """Of the carries, walked from."""
    state_out: int = NONE
    """Where the state at the end goes: the caller's states, or the carries in ``Plan.carries``."""


@dataclass(frozen=True)
class Plan:
    """What one direction's walk needs, int32 tables on the CPU."""

    segments: Tensor
    """[S, 5] rows of ``Segment``: all tokens of the pack, longest first, so that the last programs to start are
    short."""
    carries: Tensor
    """[M, 5]: segments of documents cut in several, except each document's last: their states are needed first, by
    slot."""
    chains: Tensor
    """[K, 2]: first slot and number of carries of each document that has some."""


def _cut(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """[start, end) in starts and lengths of at most ``most`` tokens."""
    return [(at, min(most, end - at)) for at in range(start, end, most)]


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Tensor:
    """[len(rows), columns] int32 on the CPU, whatever the default device is."""
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, columns)


@lru_cache(maxsize=64)
def plan_walk(
    bounds: tuple[int, ...],
    states_in: bool,
    states_out: bool,
    most: int,
    reverse: bool,
) -> Plan:
    """Cut documents [bounds[n], bounds[n + 1]) into segments of at most ``most`` tokens.

    The layers of a model walk the same packs one after the other: a plan is kept for a while.

    Args:
        bounds: N + 1 ints, rising from 0.
        states_in: documents are entered with a state each, at their end if ``reverse``; else with zero.
        states_out: the states that they are left with are kept.
        most: tokens, at least 1.
        reverse: walk from each document's last token to its first.
    """
    segments: list[Segment] = []
    carries: list[Segment] = []
    chains: list[tuple[int, int]] = []
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        pieces = _cut(start, end, most)
        if reverse:
            pieces.reverse()
        first_slot, last = len(carries), len(pieces) - 1
        if last > 0:
            chains.append((first_slot, last))
        for i, (at, length) in enumerate(pieces):
            entry = document if states_in and i == 0 else NONE
            carry = NONE if i == 0 else first_slot + i - 1
            leaves = document if states_out and i == last else NONE
            segments.append(Segment(at, length, entry, carry, leaves))
            if i < last:
                carries.append(Segment(at, length, entry, NONE, first_slot + i))
    segments.sort(key=lambda segment: -segment.length)
    return Plan(_table(segments, 5), _table(carries, 5), _table(chains, 2))


def segment_tokens(tokens: int, programs: int, processors: int, resident: int, multiple: int) -> int:
    """Tokens of the longest segment for a pack of ``tokens``: no cut if a walk of whole documents fills the GPU.

    A cut costs reading the keys and values of all but the last segment twice. So documents stay whole where the
    ``programs`` of one segment (heads x tiles) keep three quarters of the ``processors`` busy; else the pack is cut
    in as many parts as all run at once, ``resident`` programs to a processor: one more would begin when the others end.
    """
    if 4 * programs >= 3 * processors:
        return tokens
    parts = max(1, processors * resident // programs)
    return -(-tokens // (parts * multiple)) * multiple
