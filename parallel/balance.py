"""Where a packed sequence is cut, and which rank gets which segment: equal tokens, about equal work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

type Ints = NDArray[np.int64]

BALANCE = 1.05
"""The most work of a rank over the mean that is good enough."""
DEFAULT_SEGMENTS = 2
"""Segments of a rank in zigzag order, which balances a pack that is one document."""


@dataclass(frozen=True)
class ModelCost:
    """What a pack costs the whole model, in floating-point operations; any one unit will do for all three."""

    per_token: float
    """Work that every token brings: projections, experts, lightning attention, head."""
    per_pair: float
    """Work of one (query, key) pair of softmax attention, over all softmax layers."""
    per_state: float
    """Work that a rank could do in the time in which it receives one segment's lightning states of all layers."""


@dataclass(frozen=True)
class Segments:
    """A pack cut into segments that follow each other, each with its rank."""

    bounds: tuple[int, ...]
    """[S + 1] tokens: 0, then each segment's end. Lengths differ by one token at most."""
    owners: tuple[int, ...]
    """[S] the rank of each segment; all ranks have as many segments and as many tokens."""


def causal_pairs(document_bounds: Ints, at: Ints) -> Ints:
    """(query, key) pairs of causal attention inside documents whose query lies before each token of ``at``.

    Args:
        document_bounds: int64 [N + 1], rising from 0.
        at: int64 [...], tokens from 0 to the pack's length.
    """
    lengths = np.diff(document_bounds)
    before = np.concatenate(([0], np.cumsum(lengths * (lengths + 1) // 2)))
    document = np.clip(np.searchsorted(document_bounds, at, side="right") - 1, 0, len(lengths) - 1)
    inside = at - document_bounds[document]
    return before[document] + inside * (inside + 1) // 2


def cut(tokens: int, ranks: int, per_rank: int) -> Ints:
    """Bounds [ranks x per_rank + 1] of equal segments; where they don't divide, the first rows are a token longer.

    A row is ``ranks`` neighbouring segments, all of one length, so that a rank that takes one of each row has as many
    tokens as any other.
    """
    short, longer_rows = divmod(tokens // ranks, per_rank)
    lengths = np.full(ranks * per_rank, short, dtype=np.int64)
    lengths[: ranks * longer_rows] += 1
    return np.concatenate(([0], np.cumsum(lengths)))


def zigzag(ranks: int, per_rank: int) -> Ints:
    """Owners [ranks x per_rank]: rows of segments dealt to ranks in rising, then falling order, and so on."""
    rising = np.arange(ranks)
    return np.concatenate([rising if row % 2 == 0 else rising[::-1] for row in range(per_rank)])


def by_work(work: Ints, lengths: Ints, ranks: int) -> Ints:
    """Owners [S] such that every rank has equal tokens and about equal work.

    Segments of one length are sorted by work and dealt in rows of one segment a rank, the heaviest of a row to the rank
    with the least work so far: what a row leaves unequal is at most the difference within it.
    """
    owners = np.empty(len(work), dtype=np.int64)
    load = np.zeros(ranks, dtype=np.int64)
    for length in np.unique(lengths)[::-1]:
        same = np.flatnonzero(lengths == length)
        heaviest_first = same[np.argsort(-work[same], kind="stable")]
        for row in heaviest_first.reshape(-1, ranks):
            lightest_first = np.argsort(load, kind="stable")
            owners[row] = lightest_first
            load[lightest_first] += work[row]
    return owners


def imbalance(work: Ints, owners: Ints, ranks: int, cost: ModelCost, tokens: int) -> tuple[float, float]:
    """The most work of a rank, and the mean, in ``cost``'s unit. ``work`` [S] is in pairs, ``tokens`` a rank's."""
    pairs = np.bincount(owners, weights=work, minlength=ranks)
    linear = cost.per_token * tokens
    return linear + cost.per_pair * float(pairs.max()), linear + cost.per_pair * float(pairs.mean())


def choose_segments(document_bounds: Sequence[int], ranks: int, cost: ModelCost | None) -> Segments:
    """Cut a pack for ``ranks``: two segments a rank in zigzag order, or as many as balance needs.

    Where zigzag leaves a rank with more than ``BALANCE`` times the mean work, the fewest segments a rank that don't,
    dealt by work, are taken; but never so many that the further states which every rank then receives cost more than
    the balance saves.

    Args:
        document_bounds: [N + 1] ints, rising from 0.
        ranks: divides the pack's length, of which it leaves at least 2 tokens a rank unless it is 1.
        cost: what to balance; None keeps zigzag.
    """
    if ranks == 1:
        return Segments((0, document_bounds[-1]), (0,))
    documents = np.asarray(document_bounds, dtype=np.int64)
    tokens = int(documents[-1])
    best = cut(tokens, ranks, DEFAULT_SEGMENTS), zigzag(ranks, DEFAULT_SEGMENTS)
    if cost is None:
        return _frozen(*best)
    work = np.diff(causal_pairs(documents, best[0]))
    least, mean = imbalance(work, best[1], ranks, cost, tokens // ranks)
    if least <= BALANCE * mean:
        return _frozen(*best)
    for per_rank in range(DEFAULT_SEGMENTS, tokens // ranks + 1):
        states = (per_rank - DEFAULT_SEGMENTS) * ranks * cost.per_state
        if mean + states >= least:
            break
        bounds = cut(tokens, ranks, per_rank)
        work = np.diff(causal_pairs(documents, bounds))
        owners = by_work(work, np.diff(bounds), ranks)
        most, _ = imbalance(work, owners, ranks, cost, tokens // ranks)
        if most + states < least:
            least, best = most + states, (bounds, owners)
        if most <= BALANCE * mean:
            break
    return _frozen(*best)


def _frozen(bounds: Ints, owners: Ints) -> Segments:
    return Segments(tuple(bounds.tolist()), tuple(owners.tolist()))
