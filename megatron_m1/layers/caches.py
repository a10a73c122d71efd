"""What sequences carry from pass to pass in generation: the kinds of layers keep it, each in a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor


class LayerCache(Protocol):
    """What one layer keeps of all sequences."""

    def nbytes(self) -> int:
        """Its memory."""


class Caches:
    """The caches of several sequences. A forward pass packs the next tokens of some of them, each as a document.

    Args:
        sequences: how many there are.
    """

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        """Tokens that each sequence has so far."""
        self.active: list[int] = []
        """Sequences that the documents of this pass belong to, in order."""
        self._by_layer: dict[int, LayerCache] = {}

    def begin(self, active: Sequence[int]) -> None:
        """Say which sequences the next pass's documents belong to, in order."""
        self.active = list(active)

    def end(self, cu_seqlens: Sequence[int]) -> None:
        """Count the tokens of the pass that is over; ``cu_seqlens`` are its documents' bounds."""
        for sequence, (start, stop) in zip(self.active, pairwise(cu_seqlens), strict=True):
            self.lengths[sequence] += stop - start

    def positions(self, within: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Positions in the sequences, [n], from those within the pass's documents, [n]."""
        before = torch.tensor([self.lengths[sequence] for sequence in self.active])
        return within + before.repeat_interleave(torch.tensor(cu_seqlens).diff()).to(within.device)

    def of_layer[Cache: LayerCache](self, layer: int, make: Callable[[int], Cache]) -> Cache:
        """The cache of layer number ``layer``; the first time, what ``make`` gives for the number of sequences."""
        if layer not in self._by_layer:
            self._by_layer[layer] = make(len(self.lengths))
        return cast("Cache", self._by_layer[layer])

    def nbytes(self) -> dict[int, int]:
        """Memory of each layer's cache, by layer number."""
        return {layer: cache.nbytes() for layer, cache in self._by_layer.items()}
