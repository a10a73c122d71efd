"""Packs that are filled to the last token: documents end to end, cut where the pack ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_m1.data.stream.plan import Filling, Pieces
from megatron_m1.data.stream.supply import Supply

LANES = 128
"""Cut documents that wait for their next pack, at most: the pieces of a long document are so many packs of its source
apart. A step of 2,048 packs then has 16 of them at most, and the beginnings with which a run starts, while no document
waits yet, are soon over: 128 packs."""


class Chop:
    """Concatenate and cut. A document that is cut goes on at the start of the pack ``LANES`` packs later.

    Where an epoch ends, what waits is given before a new one begins. The last pack of a source that is used up is
    padded, and no other one.
    """

    def __init__(self, supply: Supply, held: Sequence[tuple[int, int, int]]) -> None:
        """
        Args:
            supply: documents.
            held: what :meth:`held` gave.
        """
        self._supply = supply
        self._waiting = deque(held)

    def held(self) -> list[tuple[int, int, int]]:
        """Document, first token and end of what waits, in its order; each goes to the end of its document."""
        return list(self._waiting)

    @property
    def is_used_up(self) -> bool:
        """Whether there is no further pack."""
        return not self._waiting and self._supply.is_used_up

    def fill(self, length: int) -> Filling:
        """The next pack of ``length`` tokens; it must not be used up."""
        parts: list[Pieces] = []
        room = length
        if len(self._waiting) == LANES:
            room -= self._place(Pieces.of([self._waiting.popleft()]), room, parts)
        while room:
            pieces = self._supply.draw(room)
            if not len(pieces) and self._waiting:
                pieces = Pieces.of([self._waiting.popleft()])
            if len(pieces):
                room -= self._place(pieces, room, parts)
            elif not self._supply.begin_epoch():
                return Filling(Pieces.joined(parts), None)
        return Filling(Pieces.joined(parts), self._following(parts[-1]))

    def _place(self, pieces: Pieces, room: int, parts: list[Pieces]) -> int:
        """Add what has room of ``pieces`` to ``parts``, of which the last may be cut; return its tokens."""
        tokens = int((pieces.ends - pieces.starts).sum())
        if tokens > room:
            document, end = int(pieces.documents[-1]), int(pieces.ends[-1])
            cut = end - (tokens - room)
            ends = pieces.ends.copy()
            ends[-1] = cut
            pieces, tokens = Pieces(pieces.documents, pieces.starts, ends), room
            self._waiting.append((document, cut, end))
        parts.append(pieces)
        return tokens

    def _following(self, last: Pieces) -> tuple[int, int] | None:
        document, end = int(last.documents[-1]), int(last.ends[-1])
        if self._waiting and self._waiting[-1][:2] == (document, end):
            return document, end
        # The label after a whole document is the first token of another one, which then begins the pack to come.
        pieces = self._supply.draw(1)
        if not len(pieces):
            return None
        found = int(pieces.documents[0]), int(pieces.starts[0])
        self._waiting.append((*found, int(pieces.ends[0])))
        return found
