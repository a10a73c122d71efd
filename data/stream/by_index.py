"""Packs of a run's stream by index, for whoever looks at them instead of training on them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_m1.data.packed import DocumentPiece, PackedSample
from megatron_m1.data.stream.plan import PackPlan
from megatron_m1.data.stream.stream import Stream

CHUNK = 64
"""Packs that are planned together and whose plans are kept, so that those beside one another cost one planning."""
PLACES = 64
"""States that are kept, at most: evenly over what was planned."""


@dataclass(frozen=True)
class Stretch:
    """Packs that a run takes from one stream, one after another, such as those of a stage."""

    packs: int
    """At least 1."""
    open_at: Callable[[Mapping[str, Any] | None], Stream]
    """Opens the stream at a state of it or of the stretch before; None is the start of the run."""


@dataclass(frozen=True)
class _Place:
    """Somewhere on the way, between two packs."""

    packs: int
    tokens: int
    stretch: int
    """Of the pack that follows."""
    state: Mapping[str, Any] | None


class IndexedPacks:
    """Pack i is the i-th that a run takes from its start on.

    A stream has an order only: the first look at pack i plans all those before it, and reads none of them. States are
    kept on the way, so that going back plans at most a 32nd of the way again.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        """
        Args:
            stretches: of the run, at least one, each of which goes on from the one before.
        """
        self._stretches = stretches
        self._ends = list(accumulate(stretch.packs for stretch in stretches))
        self._stride = CHUNK
        self._places = [_Place(0, 0, 0, None)]
        self._go_to(self._places[0])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> PackedSample:
        plan = self._plan(index)
        return self._stream.read(plan)

    def pieces(self, index: int) -> list[DocumentPiece]:
        """Where the tokens of pack ``index`` are from: documents end to end, empty ones left out."""
        return self._plan(index).pieces

    def _plan(self, index: int) -> PackPlan:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        reached = self._planned.packs
        if not reached - len(self._chunk) <= index < reached:
            place = self._places[bisect_right(self._places, index, key=lambda kept: kept.packs) - 1]
            if index < reached or reached < place.packs:
                self._go_to(place)
            while self._planned.packs <= index:
                self._advance()
        return self._chunk[index - self._planned.packs]

    def _go_to(self, place: _Place) -> None:
        self._stream = self._stretches[place.stretch].open_at(place.state)
        self._planned, self._chunk = place, list[PackPlan]()

    def _advance(self) -> None:
        """Plan the next chunk, which ends where its stretch does: a stream may have no further pack."""
        here = self._planned
        if here.packs == self._ends[here.stretch]:
            here = _Place(here.packs, here.tokens, here.stretch + 1, self._stream.state())
            self._go_to(here)
        count = min(CHUNK, self._ends[here.stretch] - here.packs)
        self._chunk = self._stream.take(count, tokens=here.tokens)
        tokens = here.tokens + sum(plan.length for plan in self._chunk)
        self._planned = _Place(here.packs + count, tokens, here.stretch, None)
        if self._planned.packs >= self._places[-1].packs + self._stride:
            self._places.append(_Place(self._planned.packs, tokens, here.stretch, self._stream.state()))
        if len(self._places) > PLACES:
            self._places = self._places[::2]
            self._stride *= 2
