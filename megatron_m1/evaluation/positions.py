"""Perplexity of held-out packs by position, within the document and within the pack, and by source."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_m1.data.packed import DocumentPiece, PackedDataset, PackedSample
from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.evaluation.scores import NOWHERE, Sums, sums_by_cell, with_cells


def octave(position: Tensor) -> Tensor:
    """Bucket of positions counted from 1: 0 is 1, 1 is 2 and 3, b is 2^b to 2^(b + 1) - 1. Exact below 2^53."""
    # x = m 2^e with m from 0.5 to 1
    return torch.frexp(position.double()).exponent.long() - 1


def octaves(length: int) -> int:
    """Buckets of a pack of ``length`` tokens."""
    return length.bit_length()


class PositionedPacks:
    """Held-out packs whose labels say where they stand: source and octave in the document, then octave in the pack.

    A document counts from where it begins in the pack: that is the context the model has, also where the packs have cut
    it. The position of a label is the number of tokens that it is predicted from.
    """

    def __init__(self, packs: PackedDataset, sources: list[str]) -> None:
        self._packs = packs
        self._sources = {source: index for index, source in enumerate(sources)}
        self.buckets = octaves(packs.sequence_length)
        self.cells = (len(sources) + 1) * self.buckets

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> PackedSample:
        sample = self._packs[index]
        cells = self._cells(len(sample.tokens), self._packs.pieces(index))
        cells[sample.loss_mask == 0] = NOWHERE
        return with_cells(sample, cells)

    def _cells(self, length: int, pieces: list[DocumentPiece]) -> Tensor:
        """Cells of all labels, int64 [length, 2]."""
        seen = torch.arange(1, length + 1)
        cells = torch.stack((torch.zeros_like(seen), len(self._sources) * self.buckets + octave(seen)), dim=1)
        for piece in pieces:
            within = torch.arange(1, piece.end - piece.start + 1)
            first = self._sources[piece.corpus] * self.buckets
            cells[piece.start : piece.end, 0] = first + octave(within)
        return cells


def perplexity(
    model: EvaluatedModel, packs: PackedDataset, sources: list[str], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Score held-out packs. Collective.

    Args:
        model: on any mesh, for packs of this length.
        packs: the same on every rank.
        sources: prefixes of the corpora, as the packs' pieces name them.
        advance: as of ``sums_by_cell``.

    Returns:
        JSON-able record, the same on every rank: ``loss`` (nats per token), ``perplexity`` and ``tokens`` of all, of
        every source, and of every octave of positions.

    Raises:
        ValueError: no label is predicted.
    """
    positioned = PositionedPacks(packs, sources)
    sums = sums_by_cell(model, positioned, positioned.cells, advance)
    buckets, end = positioned.buckets, len(sources) * positioned.buckets

    def by_position(first: int, stop: int) -> list[dict[str, Any]]:
        """Rows of every octave; its cells are ``first``, and every ``buckets`` on before ``stop``."""
        rows = []
        for b in range(buckets):
            row = _row(sums, slice(first + b, stop, buckets))
            if row["tokens"]:
                rows.append({"from": 1 << b, "to": min((1 << (b + 1)) - 1, packs.sequence_length), **row})
        return rows

    if int(sums.tokens[:end].sum()) == 0:
        raise ValueError(
            "no token is predicted in the validation packs: give corpora with documents of 2 tokens or more"
        )
    by_source = {}
    for number, source in enumerate(sources):
        cells = slice(number * buckets, (number + 1) * buckets)
        by_source[source] = _row(sums, cells) | {"by_document_position": by_position(cells.start, cells.stop)}
    return {
        **_row(sums, slice(0, end)),
        "by_document_position": by_position(0, end),
        "by_pack_position": by_position(end, end + buckets),
        "by_source": by_source,
    }


def _row(sums: Sums, cells: slice) -> dict[str, Any]:
    tokens = int(sums.tokens[cells].sum())
    loss = float(sums.loss[cells].sum()) / tokens if tokens else None
    return {"tokens": tokens, "loss": loss, "perplexity": perplexity_of(loss)}


def perplexity_of(loss: float | None) -> float | None:
    """The perplexity of a loss in nats per token; None where JSON has no number for it."""
    if loss is None or not loss < math.log(1e300):
        return None
    return math.exp(loss)
