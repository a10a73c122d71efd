"""Packs of whole documents: none that fits into a pack is cut; what no document fits into is padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from megatron_m1.data.stream.plan import Filling, Pieces
from megatron_m1.data.stream.supply import Supply

WINDOW = 1024
"""Documents among which the best fit is looked for, at most; memory and state depend on it. A million log-normal
documents of 1,024 tokens in packs of 8K leave 0.013% to padding, and with a window of 64 it is 0.031%
(``benchmarks/data_scale.py``)."""
_SERIAL_BITS = 40
"""A key is a length above a serial number, so that keys sort by length, then by age."""


class BestFit:
    """A pack begins with the document that waited longest, then takes the longest one that fits, again and again.

    The oldest first, so that none waits for more packs than the window has documents. A document longer than a pack
    begins packs only, each time one pack's length of it; its rest goes to the end of the window, which keeps its pieces
    apart, and is treated as a document. Where an epoch ends, the window is emptied before a new one begins.
    """

    def __init__(self, supply: Supply, held: Sequence[tuple[int, int, int]]) -> None:
        """
        Args:
            supply: documents.
            held: what :meth:`held` gave.
        """
        self._supply = supply
        self._serial = 0
        self._window: dict[int, tuple[int, int, int]] = {}
        """By key, the oldest first."""
        self._keys: list[int] = []
        """Sorted."""
        self._add(held)

    def held(self) -> list[tuple[int, int, int]]:
        """Document, first token and end of what waits, the oldest first; each goes to the end of its document."""
        return list(self._window.values())

    @property
    def is_used_up(self) -> bool:
        """Whether there is no further pack."""
        return not self._window and self._supply.is_used_up

    def fill(self, length: int) -> Filling:
        """The next pack of at most ``length`` tokens; it must not be used up."""
        self._refill()
        if not self._window and self._supply.begin_epoch():
            self._refill()
        document, start, end = self._pop(next(iter(self._window)))
        if end - start > length:
            cut = start + length
            self._add([(document, cut, end)])
            return Filling(Pieces.of([(document, start, cut)]), (document, cut))
        found = [(document, start, end)]
        room = length - (end - start)
        while room:
            if 2 * len(self._window) < WINDOW:
                self._refill()
            # A new epoch within a pack, once nothing of the last one is left outside of it.
            if not self._window and self._supply.begin_epoch():
                self._refill()
            place = bisect_left(self._keys, (room + 1) << _SERIAL_BITS) - 1
            if place < 0:
                break
            document, start, end = self._pop(self._keys[place], place)
            found.append((document, start, end))
            room -= end - start
        return Filling(Pieces.of(found), None)

    def _refill(self) -> None:
        pieces = self._supply.draw_pieces(WINDOW - len(self._window))
        if len(pieces):
            columns = (pieces.documents, pieces.starts, pieces.ends)
            self._add(list(zip(*(column.tolist() for column in columns), strict=True)))

    def _add(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        for serial, piece in enumerate(pieces, self._serial):
            key = (piece[2] - piece[1]) << _SERIAL_BITS | serial
            self._window[key] = piece
            self._keys.append(key)
        self._serial += len(pieces)
        # Nearly sorted already, which Python's sort makes use of.
        self._keys.sort()

    def _pop(self, key: int, place: int | None = None) -> tuple[int, int, int]:
        del self._keys[bisect_left(self._keys, key) if place is None else place]
        return self._window.pop(key)
