"""Shares of packs, their transitions, and sources that are used up."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.data.stream import StreamConfig, check_max_epochs
from megatron_m1.data.stream.credits import Credits
from tests.data.corpora import unique_documents, write_corpus
from tests.data.streams import given_tokens, opened


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_shares_are_kept_to_within_packs_however_weights_change(sources: int, seed: int) -> None:
    """Never a pack too many; what is owed is then never more than the other sources' packs too many."""
    drawn = random.Random(seed)
    deal, owed, given = Credits([0.0] * sources), [0.0] * sources, [0] * sources
    for _ in range(300):
        weights = [drawn.random() ** 3 for _ in range(sources)]
        chosen = deal.choose(weights, [True] * sources)
        assert chosen is not None
        given[chosen] += 1
        owed = [owes + weight / sum(weights) for owes, weight in zip(owed, weights, strict=True)]
        assert all(-1.0 < owes - had < sources - 1 for owes, had in zip(owed, given, strict=True))


def test_a_transition_is_exact_to_a_thousandth(tmp_path: Path) -> None:
    """From 80:20 to 30:70 over 4,000 packs, beginning after 1,000: within a pack of the integral anywhere."""
    prefixes = [write_corpus(tmp_path / f"c{first}", unique_documents([9] * 50, first_id=first)) for first in (2, 1000)]
    begin, tokens = 1000 * 8, 4000 * 8

    def weights(at: int) -> list[float]:
        way = min(max((at - begin) / tokens, 0.0), 1.0)
        return [0.8 - 0.5 * way, 0.2 + 0.5 * way]

    config = StreamConfig(prefixes, 8)
    stream = opened(config, weights=weights)
    given, owed = 0, 0.0
    for pack, plan in enumerate(stream.take(6000, tokens=0)):
        given += plan.source == 0
        owed += weights(8 * pack)[0]
        assert abs(given - owed) < 1.0
    again, first = opened(config, weights=weights), 0
    sources = []
    for step in (1, 17, 982, 1500, 3, 3497):
        sources += [plan.source for plan in again.take(step, tokens=8 * first)]
        first += step
        again = opened(config, weights=weights, state=json.loads(json.dumps(again.state())))
    assert sources == [plan.source for plan in opened(config, weights=weights).take(6000, tokens=0)]


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
def test_a_source_that_is_used_up_hands_its_weight_to_the_others(tmp_path: Path, packing: str) -> None:
    """A cap of 3 epochs: each token three times, the last pack padded; said once, also over a restart."""
    short = write_corpus(tmp_path / "short", unique_documents([5, 9, 11, 30]))
    long = [write_corpus(tmp_path / f"c{first}", unique_documents([7] * 40, first_id=first)) for first in (500, 1500)]
    config = StreamConfig([short, *long], 8, packing, max_epochs={short: 3, "another stage's": 1})  # type: ignore[arg-type]
    notes: list[str] = []
    weights = [0.5, 0.375, 0.125]
    stream = opened(config, weights=lambda tokens: weights, notes=notes)
    plans = stream.take(20, tokens=0)
    stream = opened(config, weights=lambda tokens: weights, notes=notes, state=json.loads(json.dumps(stream.state())))
    plans += stream.take(380, tokens=160)
    stream = opened(config, weights=lambda tokens: weights, notes=notes, state=json.loads(json.dumps(stream.state())))
    plans += stream.take(400, tokens=8 * 400)
    assert notes == [f"{short} is used up after 3 epochs: the other corpora take its weight"]
    times = Counter(token for token in given_tokens(plans) if token[0] == short)
    assert set(times.values()) == {3} and len(times) == 55
    own = [number for number, plan in enumerate(plans) if plan.source == 0]
    assert sum(number < 20 for number in own) == 10
    after = Counter(plan.source for plan in plans[own[-1] + 1 : own[-1] + 401])
    assert after == {1: 300, 2: 100}
    assert stream.counts().epochs[short] == 3.0
    if packing == "chop":
        assert stream.counts().padding == -3 * 55 % 8


def test_part_of_an_epoch_is_whole_documents(tmp_path: Path) -> None:
    """The cap of half an epoch stops after the document that reaches it; a later stage's cap goes on from there."""
    prefix = write_corpus(tmp_path / "c", unique_documents([10] * 21))
    half = StreamConfig([prefix], 16, max_epochs={prefix: 0.5})
    stream = opened(half)
    plans = stream.take(7, tokens=0)
    assert Counter(document for _, document, _ in given_tokens(plans)) == dict.fromkeys(
        {piece.document for plan in plans for piece in plan.pieces}, 10
    )
    assert stream.counts().tokens == {prefix: 110}
    with pytest.raises(ValueError, match=r"after 112 tokens no corpus .* \(.*c after 0\.5238 epochs\): raise it"):
        stream.take(1, tokens=112)
    rest = opened(StreamConfig([prefix], 16, max_epochs={prefix: 1}), state=stream.state())
    plans += rest.take(7, tokens=112)
    assert set(Counter(given_tokens(plans)).values()) == {1}
    assert rest.counts().tokens == {prefix: 210}
    used = opened(half, state=rest.state())
    with pytest.raises(ValueError, match="no corpus with a weight has a document left"):
        used.take(1, tokens=224)


def test_caps_that_cannot_be_enough_are_found_before_the_start(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / f"c{first}", unique_documents([10] * 10, first_id=first)) for first in (2, 200)]
    check_max_epochs(prefixes, {prefixes[0]: 4}, 10**12)
    check_max_epochs(prefixes, {prefixes[0]: 4, prefixes[1]: 1.5}, 550)
    with pytest.raises(ValueError, match=r"the run takes 551 tokens, but data\.max_epochs allows 550 of data\.train"):
        check_max_epochs(prefixes, {prefixes[0]: 4, prefixes[1]: 1.5}, 551)
    with pytest.raises(ValueError, match=r"data\.max_epochs of .*c2 is 0: give epochs above 0"):
        check_max_epochs(prefixes, {prefixes[0]: 0}, 1)


def test_what_cannot_be_a_stream_is_refused(tmp_path: Path) -> None:
    documents = unique_documents([10] * 10)
    prefix, copy = (write_corpus(tmp_path / name, documents) for name in "ab")
    (tmp_path / "link.bin").symlink_to(f"{prefix}.bin")
    (tmp_path / "link.idx").symlink_to(f"{prefix}.idx")
    for config, message in (
        (StreamConfig([prefix], 1), "sequence_length is 1"),
        (StreamConfig([prefix], 8, "pad"), r"data\.packing is 'pad': give chop or best_fit"),  # type: ignore[arg-type]
        (StreamConfig([prefix, str(tmp_path / "link")], 8), "link is .*a again: name a corpus once"),
        (StreamConfig([prefix, copy], 8), "are copies of one corpus"),
        (StreamConfig([prefix], 8, max_epochs={prefix: -1}), "is -1: give epochs above 0"),
        (StreamConfig([], 8), "the blend is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(config)
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin does not exist"):
        opened(StreamConfig([str(tmp_path / "nothing")], 8))
    state = opened(StreamConfig([prefix], 8)).state()
    (record,) = state["sources"].values()
    damages: list[dict[str, object]] = [{"supply": {}}, {"held": [[77, 0]]}, {"held": [1]}, {"given": None}]
    for damage in damages:
        broken = {**state, "sources": {name: {**record, **damage} for name in state["sources"]}}
        with pytest.raises(ValueError, match="the state of the data's stream is damaged"):
            opened(StreamConfig([prefix], 8), state=broken)


def test_a_source_of_another_stage_keeps_its_place(tmp_path: Path) -> None:
    """Stages a b, b, a b: a goes on where it stood, without a token twice."""
    prefixes = [write_corpus(tmp_path / f"c{first}", unique_documents([50] * 9, first_id=first)) for first in (2, 1000)]
    plans, state, tokens = [], None, 0
    for names, packing in ((prefixes, "chop"), (prefixes[1:], "chop"), (prefixes, "best_fit")):
        stream = opened(StreamConfig(names, 30, packing), state=state)  # type: ignore[arg-type]
        plans += stream.take(6, tokens=tokens)
        state, tokens = json.loads(json.dumps(stream.state())), tokens + 180
    assert set(Counter(given_tokens(plans)).values()) == {1}
    assert stream.counts().packs == 18
    assert sum(stream.counts().tokens.values()) == 18 * 30 - stream.counts().padding
