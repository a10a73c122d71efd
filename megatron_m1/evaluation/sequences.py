"""Sequences scored or continued together on any mesh: short ones share packs as documents that don't see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.data.packed import PackedSample
from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.evaluation.scores import NOWHERE, Sums, sums_by_cell, with_cells


@dataclass(frozen=True)
class Scored:
    """Tokens that are read, and labels of the last of them."""

    tokens: list[int]
    """At least one."""
    labels: list[int]
    """At least one and no more than ``tokens``: the last is the label of the last token."""


def score(model: EvaluatedModel, sequences: Sequence[Scored], advance: Callable[[int], None]) -> Sums:
    """Score the labels of sequences. Collective; a sequence is a cell.

    Args:
        model: on any mesh.
        sequences: the same on every rank, none longer than the model's packs.
        advance: called with the number of sequences that are done since the last call.
    """
    longest = max(len(sequence.tokens) for sequence in sequences)
    total = sum(len(sequence.tokens) for sequence in sequences)
    # All in one pack costs no more than they are long.
    length = max(longest, min(model.seq_length, total))
    dealt = _dealt(sequences, length)
    done = iter(dealt)

    def advance_by_packs(packs: int) -> None:
        advance(sum(len(next(done)) for _ in range(packs)))

    packs = [_pack(sequences, members) for members in dealt]
    return sums_by_cell(model.with_length(length), packs, len(sequences), advance_by_packs)


def _dealt(sequences: Sequence[Scored], length: int) -> list[list[int]]:
    """Which sequences share a pack: the longest first, each into the first pack that has room for it."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens)):
        size = len(sequences[index].tokens)
        place = next((place for place, room in enumerate(rooms) if room >= size), None)
        if place is None:
            place = len(packs)
            packs.append([])
            rooms.append(length)
        packs[place].append(index)
        rooms[place] -= size
    return packs


def _pack(sequences: Sequence[Scored], members: Sequence[int]) -> PackedSample:
    bounds, tokens, labels, cells = [0], list[int](), list[int](), list[int]()
    for index in members:
        sequence = sequences[index]
        before = len(sequence.tokens) - len(sequence.labels)
        tokens += sequence.tokens
        labels += [0] * before + sequence.labels
        cells += [NOWHERE] * before + [index] * len(sequence.labels)
        bounds.append(len(tokens))
    where: Tensor = torch.tensor(cells)
    mask = (where != NOWHERE).float()
    pack = PackedSample(torch.tensor(tokens), torch.tensor(labels), mask, torch.tensor(bounds, dtype=torch.int32))
    return with_cells(pack, where[:, None])
