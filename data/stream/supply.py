"""The documents of one source, in the order in which packers get them.

Packers take all of an epoch before they begin the next one, so that nothing comes twice before its epoch ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_m1.data.stream.order import DocumentOrder
from megatron_m1.data.stream.plan import Pieces

BLOCK = 4096
"""Documents whose places and lengths are looked up together; it decides no order."""


class Lengths(Protocol):
    """What supply asks of a corpus."""

    @property
    def prefix(self) -> str:
        """For messages."""

    @property
    def content(self) -> str:
        """Hash of it."""

    @property
    def tokens(self) -> int:
        """Of all documents."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document [documents]."""


class Supply:
    """Cursor in a corpus. First what packers gave back comes, then the documents of the epoch in their order."""

    def __init__(self, corpus: Lengths, *, seed: int, limit: float, state: dict[str, Any] | None) -> None:
        """
        Args:
            corpus: its lengths are read, by blocks.
            seed: of the order of every epoch that begins from here on; a begun one keeps its own.
            limit: no further document is drawn once so many tokens were; ``math.inf`` is no limit.
            state: as :meth:`state` gave it; None is the start of the first epoch.
        """
        self._corpus, self._seed, self.limit = corpus, seed, limit
        start: dict[str, Any] = {"epoch": 0, "seed": seed, "index": 0, "drawn": 0, "left": []}
        record = start if state is None else state
        self._epoch, self._epoch_seed = int(record["epoch"]), int(record["seed"])
        self._next_block = int(record["index"])
        self.drawn = int(record["drawn"])
        """Tokens of all documents that were drawn since the run began."""
        self._begin_epoch_order()
        self._set_block(self._suffixes(record["left"]), None)

    def draw(self, tokens: int) -> Pieces:
        """The next pieces, whole, until they have ``tokens`` tokens or more; fewer where the epoch ends, or a block.

        None at all means that the epoch has no more, or the limit is reached.
        """
        if self._at == len(self._block) and not self._load():
            return Pieces.of([])
        before = self._cumulated[self._at]
        return self._pop(1 + int(np.searchsorted(self._cumulated[1:], before + tokens)))

    def draw_pieces(self, count: int) -> Pieces:
        """The next ``count`` pieces; fewer where the epoch or its limit ends."""
        parts: list[Pieces] = []
        while count and (self._at < len(self._block) or self._load()):
            parts.append(self._pop(self._at + count))
            count -= len(parts[-1])
        return Pieces.joined(parts) if parts else Pieces.of([])

    def begin_epoch(self) -> bool:
        """Begin the next epoch if the limit allows; all of this one must have been drawn and given."""
        if self.drawn >= self.limit:
            return False
        if self.drawn != (self._epoch + 1) * self._corpus.tokens:
            raise ValueError(
                f"{self._corpus.prefix}.idx is damaged: the lengths of its documents do not sum to their "
                f"{self._corpus.tokens:,} tokens; tokenise the corpus again"
            )
        self._epoch, self._epoch_seed, self._next_block = self._epoch + 1, self._seed, 0
        self._begin_epoch_order()
        return True

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more will come: the limit is reached, and nothing given back is left."""
        return self.drawn >= self.limit and self._at == len(self._block)

    def left(self) -> list[tuple[int, int]]:
        """(document, first token) of pieces that were given back and not drawn again."""
        if self._places is not None:
            return []
        rest = slice(self._at, None)
        return list(zip(self._block.documents[rest].tolist(), self._block.starts[rest].tolist(), strict=True))

    def give_back(self, suffixes: Sequence[tuple[int, int]]) -> None:
        """Take (document, first token) back from a packer that ends: they come first. Before anything is drawn."""
        assert self._places is None and self._at == 0
        self._set_block(self._suffixes([*suffixes, *self.left()]), None)

    def state(self) -> dict[str, Any]:
        """Where it stands, for ``__init__``, as JSON values."""
        index = self._next_block
        if self._places is not None and self._at < len(self._block):
            index = int(self._places[self._at])
        left = [list(piece) for piece in self.left()]
        return {
            "epoch": self._epoch,
            "seed": self._epoch_seed,
            "index": index,
            "drawn": self.drawn,
            "left": left,
        }

    def _begin_epoch_order(self) -> None:
        self._order = DocumentOrder(len(self._corpus.lengths), self._epoch_seed, self._epoch, self._corpus.content)

    def _suffixes(self, suffixes: Sequence[Sequence[int]]) -> Pieces:
        documents, starts = np.array(suffixes, np.int64).reshape(-1, 2).T
        return Pieces(documents, starts, self._corpus.lengths[documents].astype(np.int64))

    def _set_block(self, block: Pieces, places: npt.NDArray[np.int64] | None) -> None:
        """
        Args:
            block: what is drawn next.
            places: of its documents in the order; None for what was given back.
        """
        self._block, self._places, self._at = block, places, 0
        self._cumulated = np.concatenate(([0], np.cumsum(block.ends - block.starts)))

    def _load(self) -> bool:
        """Have the next block of the epoch; False if it has no more."""
        while self._next_block < len(self._corpus.lengths) and self.drawn < self.limit:
            places = np.arange(self._next_block, min(self._next_block + BLOCK, len(self._corpus.lengths)))
            documents = self._order.at(int(places[0]), int(places[-1]) + 1)
            lengths = self._corpus.lengths[documents].astype(np.int64)
            # The document that reaches the limit is the last one; those after it stay for a run with a higher limit.
            allowed = int(np.count_nonzero(self.drawn + np.cumsum(lengths) - lengths < self.limit))
            self._next_block += allowed
            kept = np.flatnonzero(lengths[:allowed])
            if len(kept):
                lengths = lengths[kept]
                self._set_block(Pieces(documents[kept], np.zeros_like(lengths), lengths), places[kept])
                return True
        return False

    def _pop(self, stop: int) -> Pieces:
        found, start = slice(self._at, stop), self._at
        self._at = min(stop, len(self._block))
        if self._places is not None:
            self.drawn += int(self._cumulated[self._at] - self._cumulated[start])
        return Pieces(self._block.documents[found], self._block.starts[found], self._block.ends[found])
