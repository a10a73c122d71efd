"""Which lightning states a rank sends, and how those that enter its segments come together out of all ranks'."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_m1.parallel.crossings import Crossings, RankSegments, Rows
from megatron_m1.parallel.scan import Chain, Link


@dataclass(frozen=True)
class StateExchange:
    """One direction: the states that this rank sends and those that it computes from what it gathers."""

    slots: int
    """States that each rank contributes to the all-gather: as many as the rank that has the most. 0: no collective."""
    sends: tuple[Rows, ...]
    """Pieces whose own states this rank contributes, in the order of their slots; at most ``slots``."""
    receives: tuple[Rows, ...]
    """Pieces for which this rank needs a state, in the order of the scan's outputs."""
    chains: tuple[Chain, ...]
    """How they come together: sources count through the slots of rank 0, then of rank 1, and so on."""


@dataclass(frozen=True)
class StatePlan:
    """What LASP+ exchanges for one rank. It follows from the documents' bounds alone: no rank has to ask another."""

    forward: StateExchange
    """Sends the states that tails leave, receives those that heads begin with."""
    backward: StateExchange
    """Sends the gradients that heads leave, receives those with which tails end."""

    @property
    def is_empty(self) -> bool:
        """No document crosses any segment's bound: no rank communicates."""
        return self.forward.slots == 0


def plan_states(crossings: Crossings, owners: Sequence[int], rank: int) -> StatePlan:
    """Plan both directions for ``rank``.

    Args:
        crossings: where documents go on.
        owners: [S] the rank of each segment.
        rank: this one.
    """
    mine = RankSegments(crossings, [s for s, owner in enumerate(owners) if owner == rank])
    tails, heads = (np.flatnonzero(flags).tolist() for flags in (crossings.goes_on, crossings.came_in))
    my_tails, my_heads = ([s for s in segments if owners[s] == rank] for segments in (tails, heads))

    lengths = crossings.lengths.tolist()
    origin, reach = crossings.origin.tolist(), crossings.reach.tolist()
    forward_slots, sources = _number(tails, owners)
    # The state that enters segment s has gone through the document's segments up to s - 1.
    forward = _chains(my_heads, lambda s: range(origin[s], s), sources, lengths)
    backward_slots, sources = _number(heads, owners)
    # The gradient of the state that leaves segment s comes from the document's segments, the last one first.
    backward = _chains(my_tails, lambda s: range(reach[s], s, -1), sources, lengths)
    tail_rows, head_rows = tuple(map(mine.tail_rows, my_tails)), tuple(map(mine.head_rows, my_heads))
    return StatePlan(
        StateExchange(forward_slots, tail_rows, head_rows, forward),
        StateExchange(backward_slots, head_rows, tail_rows, backward),
    )


def _number(segments: Iterable[int], owners: Sequence[int]) -> tuple[int, dict[int, int]]:
    """Slots a rank, and the row of each of ``segments`` among all ranks' slots."""
    held: defaultdict[int, list[int]] = defaultdict(list)
    for s in segments:
        held[owners[s]].append(s)
    slots = max(map(len, held.values()), default=0)
    return slots, {s: rank * slots + slot for rank, mine in held.items() for slot, s in enumerate(mine)}


def _chains(
    wanted: Sequence[int], walk: Callable[[int], range], sources: dict[int, int], lengths: Sequence[int]
) -> tuple[Chain, ...]:
    """One chain per document: the walk to its farthest wanted segment passes all the others' ends."""
    outputs = {walk(s)[-1]: output for output, s in enumerate(wanted)}
    longest: dict[int, range] = {}
    for s in wanted:
        links = walk(s)
        if len(links) > len(longest.get(links[0], ())):
            longest[links[0]] = links
    return tuple(tuple(Link(sources[s], lengths[s], outputs.get(s, -1)) for s in links) for links in longest.values())
