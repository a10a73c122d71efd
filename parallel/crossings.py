"""Where documents go on from one segment of a pack to the next: all that the exchange plans need to know."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_m1.parallel.balance import Ints

type Rows = tuple[int, int]
"""[start, end) of local tokens."""


@dataclass(frozen=True)
class Crossings:
    """For each of S segments: which document goes on at its end, and which came in at its start.

    At most one document crosses each bound, so a segment has at most one *tail* (the piece of the document that goes on
    after the segment) and one *head* (the piece of the document that came in). Both are the whole segment where one
    document goes through.
    """

    document_bounds: Ints
    """[N + 1] global tokens."""
    segment_bounds: Ints
    """[S + 1] global tokens."""
    tail_start: Ints
    """[S] global token at which the tail begins; the segment's end where no document goes on."""
    head_end: Ints
    """[S] global token at which the head ends; the segment's start where no document came in."""
    reach: Ints
    """[S] the last segment with tokens of the document that goes on; the segment itself where none does."""
    origin: Ints
    """[S] the first segment with tokens of the document that came in; the segment itself where none did."""

    @classmethod
    def of(cls, document_bounds: Sequence[int], segment_bounds: Sequence[int]) -> Crossings:
        """Compare the two ways in which a pack is cut."""
        documents, segments = np.asarray(document_bounds, dtype=np.int64), np.asarray(segment_bounds, dtype=np.int64)
        inner = segments[1:-1]
        document = np.searchsorted(documents, inner, side="right") - 1  # [S - 1], of the token after each inner bound
        crossed = documents[document] != inner
        starts, ends = documents[document], documents[document + 1]
        count = len(segments) - 1
        tail_start, head_end = segments[1:].copy(), segments[:-1].copy()
        reach, origin = np.arange(count), np.arange(count)
        tail_start[:-1] = np.where(crossed, np.maximum(segments[:-2], starts), inner)
        head_end[1:] = np.where(crossed, np.minimum(segments[2:], ends), inner)
        last = np.searchsorted(segments, ends - 1, side="right") - 1
        first = np.searchsorted(segments, starts, side="right") - 1
        reach[:-1] = np.where(crossed, last, reach[:-1])
        origin[1:] = np.where(crossed, first, origin[1:])
        return cls(documents, segments, tail_start, head_end, reach, origin)

    @property
    def lengths(self) -> Ints:
        """[S] tokens of each segment."""
        return np.diff(self.segment_bounds)

    @property
    def goes_on(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[S] whether a document goes on after the segment."""
        return self.reach > np.arange(len(self.reach))

    @property
    def came_in(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[S] whether a document came in from the segment before."""
        return self.origin < np.arange(len(self.origin))


class RankSegments:
    """One rank's segments, and where their pieces lie among the rank's own tokens."""

    def __init__(self, crossings: Crossings, owned: Sequence[int]) -> None:
        """``owned`` are the rank's segments, rising: in this order it holds them, one after the other."""
        self.crossings = crossings
        self.owned = owned
        lengths = crossings.lengths[list(owned)]
        starts = np.cumsum(lengths) - lengths
        self._offsets = dict(zip(owned, (starts - crossings.segment_bounds[list(owned)]).tolist(), strict=True))

    def tail_rows(self, segment: int) -> Rows:
        """Local tokens of a segment's tail."""
        crossings, offset = self.crossings, self._offsets[segment]
        return int(crossings.tail_start[segment]) + offset, int(crossings.segment_bounds[segment + 1]) + offset

    def head_rows(self, segment: int) -> Rows:
        """Local tokens of a segment's head."""
        crossings, offset = self.crossings, self._offsets[segment]
        return int(crossings.segment_bounds[segment]) + offset, int(crossings.head_end[segment]) + offset

    def document_bounds(self, *, joined: bool) -> tuple[int, ...]:
        """[N + 1] bounds of the documents' pieces in local tokens.

        A document that goes on from one of the rank's segments into its next is one piece if ``joined``, else two.
        """
        crossings, pieces = self.crossings, [np.zeros(1, dtype=np.int64)]
        for segment, following in itertools.zip_longest(self.owned, self.owned[1:]):
            start, end = crossings.segment_bounds[segment], crossings.segment_bounds[segment + 1]
            first, last = np.searchsorted(crossings.document_bounds, [start, end], side="right")
            inner = crossings.document_bounds[first:last]
            pieces.append(inner[inner < end] + self._offsets[segment])
            if not joined or following is None or following > crossings.reach[segment]:
                pieces.append(np.array([end + self._offsets[segment]]))
        return tuple(np.concatenate(pieces).tolist())
