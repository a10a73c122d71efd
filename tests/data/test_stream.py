"""The stream of packs against the documents it is made of, which a look-up tells."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_m1.data.stream import StreamConfig
from tests.data.corpora import unique_documents, write_corpus
from tests.data.streams import check_pack, fields, given_tokens, opened

LENGTHS = [1, 5, 1, 0, 13, 2, 31, 7, 7, 1, 3, 90, 6, 0, 9, 1, 22, 4, 16]
TOTAL = sum(LENGTHS)


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
@pytest.mark.parametrize("length", [2, 7, 64, 500])
def test_every_token_comes_once_an_epoch(tmp_path: Path, packing: str, length: int) -> None:
    """Packs of many documents, documents of many packs, packs of several epochs; no pack beside its documents."""
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    stream = opened(StreamConfig([prefix], length, packing))  # type: ignore[arg-type]
    plans = stream.take(1 + 5 * TOTAL // length, tokens=0)
    for plan in plans:
        check_pack(stream.read(plan), plan, documents)
    given = given_tokens(plans)
    assert all(Counter(given[start : start + TOTAL]).most_common(1)[0][1] == 1 for start in range(0, 3 * TOTAL, TOTAL))
    if packing == "chop":
        assert len(given) == length * len(plans)
        assert given[:TOTAL] != given[TOTAL : 2 * TOTAL], "an epoch has an order of its own"
    counts = stream.counts()
    assert (counts.packs, counts.tokens) == (len(plans), {prefix: len(given)})
    assert counts.epochs == {prefix: len(given) / TOTAL}
    assert counts.padding == length * len(plans) - len(given)
    begun = [piece for plan in plans for piece in plan.pieces if piece.offset == 0]
    assert counts.documents == len(begun)
    assert counts.cut_documents == sum(piece.end - piece.start < LENGTHS[piece.document] for piece in begun)


def test_pieces_of_a_long_document_are_apart(tmp_path: Path) -> None:
    """200 documents of 10 packs: a document comes again after 128 packs, as many as wait."""
    prefix = write_corpus(tmp_path / "c", [[2] * 80] * 200)
    plans = opened(StreamConfig([prefix], 8)).take(1900, tokens=0)
    packs: dict[int, list[int]] = {}
    for number, plan in enumerate(plans[:1000]):
        for piece in plan.pieces:
            packs.setdefault(piece.document, []).append(number)
    assert {after - before for found in packs.values() for before, after in pairwise(found)} == {128}


def test_documents_flow_into_each_other_where_nothing_is_reset(tmp_path: Path) -> None:
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    config = StreamConfig([prefix], 16, reset_at_documents=False)
    stream = opened(config)
    samples = [stream.read(plan) for plan in stream.take(9, tokens=0)]
    apart = opened(replace(config, reset_at_documents=True))
    for sample, other in zip(samples, [apart.read(plan) for plan in apart.take(9, tokens=0)], strict=True):
        assert sample.tokens.tolist() == other.tokens.tolist()
        assert sample.labels.tolist() == other.labels.tolist()
        assert (sample.loss_mask.tolist(), sample.cu_seqlens.tolist()) == ([1.0] * 16, [0, 16])
    padded = opened(replace(config, packing="best_fit", sequence_length=60))
    for plan in padded.take(4, tokens=0):
        sample, tokens = padded.read(plan), plan.tokens
        assert sample.cu_seqlens.tolist() == [0, tokens] + [60] * (tokens < 60)
        assert sample.loss_mask.sum() == tokens - (plan.filling.following is None)


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
def test_the_state_goes_on_wherever_the_corpora_lie(tmp_path: Path, packing: str) -> None:
    """A restart after any number of packs, by JSON, on a copy in another folder, whatever the steps."""
    documents = unique_documents(LENGTHS * 5, eod=None)
    places = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        places.append(StreamConfig([write_corpus(tmp_path / name / "c", documents)], 12, packing))  # type: ignore[arg-type]
    whole = opened(places[0])
    right = [fields(whole.read(plan)) for plan in whole.take(160, tokens=0)]
    for stop in (0, 1, 7, 64, 90, 91, 150):
        first = opened(places[0])
        first.take(stop, tokens=0)
        state = json.loads(json.dumps(first.state()))
        second = opened(places[1], state=state)
        assert second.state() == {
            **state,
            "sources": {name: {**record, "prefix": places[1].prefixes[0]} for name, record in state["sources"].items()},
        }
        rest = [plan for step in range(stop, 160) for plan in second.take(1, tokens=12 * step)]
        assert [fields(second.read(plan)) for plan in rest] == right[stop:]
        assert second.counts().packs == 160
        assert second.state()["sources"].keys() == state["sources"].keys()


def test_what_a_mask_says_is_not_learnt(tmp_path: Path) -> None:
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    learnt = np.random.default_rng(0).integers(0, 2, TOTAL).astype(np.uint8)
    Path(f"{prefix}.loss").write_bytes(learnt.tobytes())
    for config in (StreamConfig([prefix], 12), StreamConfig([prefix], 12, "best_fit", reset_at_documents=False)):
        masked = opened(config)
        found = [masked.read(plan) for plan in masked.take(20, tokens=0)]
        Path(f"{prefix}.loss").rename(tmp_path / "away")
        plain = opened(config)
        for sample, other in zip(found, [plain.read(plan) for plan in plain.take(20, tokens=0)], strict=True):
            # The ids count from 2 on, so that each tells its byte.
            said = [float(learnt[label - 2]) if label else 0.0 for label in sample.labels.tolist()]
            both = [a * b for a, b in zip(said, other.loss_mask.tolist(), strict=True)]
            assert sample.loss_mask.tolist() == both
        (tmp_path / "away").rename(f"{prefix}.loss")
    Path(f"{prefix}.loss").write_bytes(bytes(TOTAL - 1))
    with pytest.raises(ValueError, match=rf"c\.loss has {TOTAL - 1} bytes, its corpus {TOTAL} tokens"):
        opened(StreamConfig([prefix], 12))


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
def test_neither_state_nor_start_grow_with_what_was_seen(tmp_path: Path, packing: str) -> None:
    """Bytes of the state, and calls from opening to the first pack, after 1,500 packs and ten times as many."""
    rng = np.random.default_rng(0)
    documents = [[2] * length for length in rng.integers(0, 40, 6000).tolist()]
    prefix = write_corpus(tmp_path / "c", documents)
    config = StreamConfig([prefix], 16, packing)  # type: ignore[arg-type]
    stream = opened(config)
    calls, sizes = [], []
    for packs in (1500, 13_500):
        stream.take(packs, tokens=0)
        state = stream.state()
        sizes.append(len(json.dumps(state)))
        counter = Counter[str]()
        sys.setprofile(lambda frame, event, arg, counter=counter: counter.update([event]))  # type: ignore[misc]
        try:
            opened(config, state=state).take(1, tokens=0)
        finally:
            sys.setprofile(None)
        calls.append(counter["call"] + counter["c_call"])
    assert stream.counts().epochs[prefix] > 1.5
    assert max(sizes) < 25_000 and sizes[1] < 1.1 * sizes[0]
    assert calls[1] < 1.1 * calls[0]
