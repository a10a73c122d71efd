"""Packs of a run by index: those of its streams, however one goes about them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.data.stream import IndexedPacks, Stream, StreamConfig, Stretch
from megatron_m1.data.stream.by_index import CHUNK, PLACES
from tests.data.corpora import unique_documents, write_corpus
from tests.data.streams import fields, opened


def test_pack_i_is_the_ith_that_was_taken(tmp_path: Path) -> None:
    """Over three stages of other lengths and packing, forwards, backwards and by chance."""
    prefix = write_corpus(tmp_path / "c", unique_documents([1, 5, 40, 9, 13, 2, 31, 7] * 20, eod=None))
    stages = [
        (StreamConfig([prefix], 8), 100),
        (StreamConfig([prefix], 20, "best_fit"), 1),
        (StreamConfig([prefix], 12), 3 * CHUNK),
    ]
    right, state, tokens = [], None, 0
    for config, count in stages:
        stream = opened(config, state=state)
        right += [fields(stream.read(plan)) for plan in stream.take(count, tokens=tokens)]
        state, tokens = stream.state(), tokens + count * config.sequence_length

    def stretch(config: StreamConfig, count: int) -> Stretch:
        return Stretch(count, lambda state: opened(config, state=state))

    packs = IndexedPacks([stretch(*stage) for stage in stages])
    order = [*range(len(right)), *reversed(range(len(right)))]
    order += random.Random(0).choices(range(len(right)), k=60)
    for index in order:
        assert fields(packs[index]) == right[index]
    fresh = IndexedPacks([stretch(*stage) for stage in stages])
    assert fields(fresh[150]) == right[150]
    assert sum(piece.end - piece.start for piece in fresh.pieces(100)) <= 20
    for index in (-1, len(right)):
        with pytest.raises(IndexError, match=f"pack {index} of {len(right)}"):
            packs[index]


def test_going_back_is_cheap_and_little_is_kept(tmp_path: Path) -> None:
    """Of n packs planned, another look plans a 32nd at most."""
    prefix = write_corpus(tmp_path / "c", unique_documents([7] * 50))
    streams: list[tuple[Stream, int]] = []

    def open_at(state: Mapping[str, Any] | None) -> Stream:
        stream = opened(StreamConfig([prefix], 2), state=state)
        streams.append((stream, stream.counts().packs))
        return stream

    def planned() -> int:
        return sum(stream.counts().packs - start for stream, start in streams)

    count = 3 * PLACES * CHUNK
    packs = IndexedPacks([Stretch(count, open_at)])
    packs.pieces(count - 1)
    assert planned() == count
    for index in (0, count // 3, count // 2, count - CHUNK - 1):
        before = planned()
        packs.pieces(index)
        assert planned() - before <= count // 32 + CHUNK
