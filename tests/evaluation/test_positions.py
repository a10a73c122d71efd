"""Where labels are counted, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_m1.data.packed import build_packed_dataset
from megatron_m1.evaluation.positions import PositionedPacks, octave, octaves, perplexity_of
from megatron_m1.evaluation.scores import CELLS, NOWHERE
from tests.data.corpora import FakeTokenizer, unique_documents, write_corpus


def test_octaves_begin_at_powers_of_two() -> None:
    powers = [1 << b for b in range(1, 40)]
    positions = torch.tensor([1, *(p + step for p in powers for step in (-1, 0))])
    assert octave(positions).tolist() == [0, *(b + step for b in range(1, 40) for step in (-1, 0))]
    for length in (1, 2, 3, 4, 7, 8, 1000):
        assert octaves(length) == int(octave(torch.tensor(length))) + 1


def test_labels_are_counted_where_they_stand(tmp_path: Path) -> None:
    corpora = [
        write_corpus(tmp_path / "a", unique_documents([5, 9])),
        write_corpus(tmp_path / "b", unique_documents([4, 20], first_id=100)),
    ]
    packs = build_packed_dataset(
        corpora, sequence_length=8, num_samples=4, seed=1, tokenizer=FakeTokenizer(), cache_folder=tmp_path / "cache"
    )
    positioned = PositionedPacks(packs, corpora)
    buckets = 4
    assert positioned.cells == 3 * buckets
    counted = 0
    for index in range(len(packs)):
        pack = positioned[index]
        for piece in packs.pieces(index):
            for at in range(piece.start, piece.end):
                in_document, in_pack = pack.extra[CELLS][at].tolist()
                if pack.loss_mask[at] == 0:
                    assert (in_document, in_pack) == (NOWHERE, NOWHERE)
                    continue
                counted += 1
                context = at - piece.start + 1
                assert in_document == corpora.index(piece.corpus) * buckets + context.bit_length() - 1
                assert in_pack == 2 * buckets + (at + 1).bit_length() - 1
    assert counted == sum(int(packs[index].loss_mask.sum()) for index in range(len(packs))) > 0


def test_a_perplexity_that_json_can_say() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(2.0) == pytest.approx(7.389056, rel=1e-6)
    assert perplexity_of(None) is None
    assert perplexity_of(1e4) is None
    assert perplexity_of(float("nan")) is None
