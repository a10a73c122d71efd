"""Which keys and values softmax attention sends where, and which queries attend to them at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_m1.parallel.crossings import Crossings, RankSegments, Rows


@dataclass(frozen=True)
class Rectangle:
    """Queries that attend to all of some keys: the keys lie before them in the same document."""

    queries: Rows
    """Local tokens."""
    keys: Rows
    """Tokens of the block that holds the keys."""


@dataclass(frozen=True)
class Step:
    """One exchange: this rank's keys and values go ``distance`` ranks on, others come from as far behind."""

    distance: int
    sends: tuple[Rows, ...]
    """Ranges of local tokens that the rank ahead can attend to; empty if none."""
    receives: int
    """Tokens that come in from the rank behind, 0 if none."""
    rectangles: tuple[Rectangle, ...]
    """What is computed with them."""

    @property
    def sent(self) -> int:
        """Tokens that this rank sends."""
        return sum(end - start for start, end in self.sends)


@dataclass(frozen=True)
class RingPlan:
    """What one rank does in one softmax layer, forward; backward retraces it."""

    local_bounds: tuple[int, ...]
    """[N + 1] bounds of this rank's tokens of each document, all its segments together: causal within each."""
    steps: tuple[Step, ...]
    """The exchanges that any rank needs, at rising distances: the same list of distances on every rank."""


def plan_ring(crossings: Crossings, owners: Sequence[int], rank: int) -> RingPlan:
    """Plan the exchanges of ``rank``.

    Every (query, key) pair of a document falls in one place: on the rank that holds both, in one causal call, since a
    rank holds its tokens in their order; or else in one rectangle of the step at the distance of the two ranks. The
    keys that leave a segment are its tail, and the queries that they meet are the heads of later segments.

    Args:
        crossings: where documents go on.
        owners: [S] the rank of each segment.
        rank: this one.
    """
    ranks = max(owners) + 1
    owner, reach = np.asarray(owners), crossings.reach
    tails = np.flatnonzero(crossings.goes_on)
    by_rank = [np.flatnonzero(owner == r) for r in range(ranks)]
    # needs[t, r]: some segment of rank r holds a head of the document of tail t, and r is not the tail's owner
    needs = np.zeros((len(tails), ranks), dtype=bool)
    for r, owned in enumerate(by_rank):
        following = np.searchsorted(owned, tails, side="right")
        last = np.append(owned, len(owner))[following]  # the next segment of r after each tail, or none
        needs[:, r] = (last <= reach[tails]) & (owner[tails] != r)
    pairs = np.unique((np.arange(ranks)[None, :] - owner[tails][:, None])[needs] % ranks)
    mine = RankSegments(crossings, by_rank[rank].tolist())
    steps = []
    for distance in pairs.tolist():
        ahead, behind = (rank + distance) % ranks, (rank - distance) % ranks
        to_send = tails[needs[:, ahead] & (owner[tails] == rank)]
        to_receive = tails[needs[:, rank] & (owner[tails] == behind)]
        received, rectangles = _rectangles(mine, to_receive.tolist())
        steps.append(Step(distance, tuple(mine.tail_rows(t) for t in to_send.tolist()), received, rectangles))
    return RingPlan(mine.document_bounds(joined=True), tuple(steps))


def _rectangles(mine: RankSegments, tails: list[int]) -> tuple[int, tuple[Rectangle, ...]]:
    """Tokens of ``tails`` end to end, and which heads attend to which of them.

    The tails of one document lie side by side in the block. A head attends to those before it; neighbouring heads
    that attend to the same ones lie side by side too, and share a rectangle.
    """
    crossings, offset = mine.crossings, 0
    found: list[Rectangle] = []
    first: dict[int, int] = {}
    ends: list[tuple[int, int]] = []
    for tail in tails:
        first.setdefault(int(crossings.reach[tail]), offset)
        offset += int(crossings.segment_bounds[tail + 1] - crossings.tail_start[tail])
        ends.append((tail, offset))
    for head in mine.owned:
        before = [(tail, end) for tail, end in ends if tail < head <= crossings.reach[tail]]
        if not before:
            continue
        tail, end = before[-1]
        keys, rows = (first[int(crossings.reach[tail])], end), mine.head_rows(head)
        if found and found[-1].keys == keys and found[-1].queries[1] == rows[0]:
            rows = (found.pop().queries[0], rows[1])
        found.append(Rectangle(rows, keys))
    return offset, tuple(found)
