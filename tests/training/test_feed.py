"""Which rank has which packs: of a step, in the stream's order, and of the held-out ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.data.packed import build_packed_dataset
from megatron_m1.data.stream import StreamConfig, open_stream
from megatron_m1.training.feed import Feed
from tests.data.corpora import FakeTokenizer, unique_documents, write_corpus

PACKS = 12


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("feed") / "c", unique_documents([5, 9, 3, 14, 1, 8, 22, 6], eod=None))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_packs_do_not_depend_on_the_number_of_ranks(prefix: str, tmp_path: Path, size: int) -> None:
    tokenizer = FakeTokenizer()
    held_out = build_packed_dataset(
        [prefix], sequence_length=6, num_samples=PACKS, seed=4, tokenizer=tokenizer, cache_folder=tmp_path
    )

    def feed(rank: int, size: int) -> Feed:
        stream = open_stream(
            StreamConfig([prefix], 6), tokenizer=tokenizer, weights=lambda tokens: [1.0], state=None, note=print
        )
        return Feed(stream, held_out, rank, size)

    alone, ranks = feed(0, 1), [feed(rank, size) for rank in range(size)]
    for step in range(2):
        whole = [plan.pieces for plan in alone.take(PACKS, tokens=6 * PACKS * step)]
        shares = [[plan.pieces for plan in rank.take(PACKS, tokens=6 * PACKS * step)] for rank in ranks]
        assert [shares[n % size][n // size] for n in range(PACKS)] == whole
    held = [[pack.tokens.tolist() for pack in rank.held_out_share()] for rank in ranks]
    assert [held[n % size][n // size] for n in range(PACKS)] == [
        pack.tokens.tolist() for pack in map(held_out.__getitem__, range(PACKS))
    ]
    assert {len(share) for share in held} == {PACKS // size}


def test_without_held_out_packs_there_is_no_share(prefix: str) -> None:
    stream = open_stream(
        StreamConfig([prefix], 6), tokenizer=FakeTokenizer(), weights=lambda tokens: [1.0], state=None, note=print
    )
    assert Feed(stream, None, 0, 1).held_out_share() == []
