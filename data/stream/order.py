"""The order of a corpus's documents in an epoch: a permutation of which any part is computed by itself.

A Feistel network on pairs (left, right) with a x a >= the number of documents, so that no array of all documents is
ever made: a corpus of billions opens at once, and in the middle of an epoch as fast as at its start.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

ROUNDS = 8
"""Four make a network pseudo-random in theory; the halves of small corpora have few values, which more rounds mix."""


@dataclass(frozen=True)
class DocumentOrder:
    """Pseudo-random order of ``documents`` documents, the same wherever the corpus lies."""

    documents: int
    """At least 1."""
    seed: int
    epoch: int
    content: str
    """What tells the corpus from others: a hash of it."""

    @cached_property
    def _keys(self) -> list[np.uint64]:
        text = f"{self.seed} {self.epoch} {self.content}".encode()
        digest = hashlib.shake_256(text).digest(8 * ROUNDS)
        return [np.uint64(key) for key in np.frombuffer(digest, "<u8")]

    def at(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Documents at places ``start`` to ``stop - 1`` of the order; time and memory depend on their number only."""
        found = self._permuted(np.arange(start, stop, dtype=np.uint64))
        # Pairs are a few more than documents: what is no document is permuted again until it is one, which keeps
        # the whole a permutation of the documents.
        beyond = np.flatnonzero(found >= np.uint64(self.documents))
        while len(beyond):
            found[beyond] = self._permuted(found[beyond])
            beyond = beyond[found[beyond] >= np.uint64(self.documents)]
        return found.astype(np.int64)

    def _permuted(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        # Even: with an odd side no round would change a permutation's sign, and a few documents had half of the orders.
        side = np.uint64((math.isqrt(self.documents - 1) + 2) // 2 * 2)
        left, right = places // side, places % side
        for key in self._keys:
            left, right = right, (left + _mixed(right ^ key) % side) % side
        return left * side + right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64 bits whose every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
