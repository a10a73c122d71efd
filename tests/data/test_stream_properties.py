"""What holds for any stream: however stages, steps, restarts and ranks cut it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.data.stream import PackPlan, StreamConfig, best_fit, chop, supply
from tests.data.corpora import write_corpus
from tests.data.streams import check_pack, given_tokens, opened

SOURCES = {
    "mixed": [1, 5, 1, 0, 13, 2, 31, 7, 7, 1, 3, 90, 6, 0, 9, 1, 22, 4, 16],
    "single": [40],
    "tokens": [1, 1, 0, 1, 1, 1],
    "long": [300, 1, 2],
}
DOCUMENTS = {
    name: [[2 + 1000 * number + at for at in range(length)] for number, length in enumerate(lengths)]
    for name, lengths in SOURCES.items()
}


@dataclass(frozen=True)
class Stage:
    """What a stage says of its data."""

    length: int
    packing: Literal["chop", "best_fit"]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    steps: tuple[int, ...]
    """Packs of each step."""


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    names = draw(st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, unique=True))
    return Stage(
        draw(st.sampled_from([2, 3, 8, 17, 64, 250])),
        draw(st.sampled_from(["chop", "best_fit"])),
        tuple(names),
        tuple(draw(st.floats(0.05, 1.0)) for _ in names),
        tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, documents in DOCUMENTS.items():
        write_corpus(folder / name, documents)
    return folder


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small corpora fill them, and have many blocks."""
    monkeypatch.setattr(chop, "LANES", 3)
    monkeypatch.setattr(best_fit, "WINDOW", 4)
    monkeypatch.setattr(supply, "BLOCK", 5)


def run(folder: Path, recipe: list[Stage], *, restart: bool, one_by_one: bool = False) -> list[PackPlan]:
    """All plans of stages; with ``restart``, each step is of a fresh process."""
    plans, tokens, state = [], 0, None
    for stage in recipe:
        config = StreamConfig([str(folder / name) for name in stage.names], stage.length, stage.packing)
        stream = opened(config, state=state, weights=lambda _, stage=stage: stage.weights)  # type: ignore[misc]
        steps = [1] * sum(stage.steps) if one_by_one else stage.steps
        for step in steps:
            if restart:
                state = json.loads(json.dumps(stream.state()))
                stream = opened(config, state=state, weights=lambda _, stage=stage: stage.weights)  # type: ignore[misc]
            taken = stream.take(step, tokens=tokens)
            for plan in taken:
                name = Path(plan.corpus).name
                check_pack(stream.read(plan), plan, DOCUMENTS[name])
            plans += taken
            tokens += step * stage.length
        state = stream.state()
    return plans


def content(plans: list[PackPlan]) -> list[tuple[object, ...]]:
    return [(plan.corpus, plan.length, plan.filling.following, tuple(plan.pieces)) for plan in plans]


@settings(max_examples=40, deadline=None)
@given(recipe=st.lists(stages(), min_size=1, max_size=4))
def test_every_token_comes_once_an_epoch_whatever_the_stages(folder: Path, recipe: list[Stage]) -> None:
    """Nothing comes twice before its source's epoch has ended, and a document is cut only where it must be."""
    plans = run(folder, recipe, restart=False)
    by_source: dict[str, list[tuple[int, int]]] = {}
    for corpus, document, token in given_tokens(plans):
        by_source.setdefault(Path(corpus).name, []).append((document, token))
    for name, tokens in by_source.items():
        total = sum(SOURCES[name])
        for start in range(0, len(tokens), total):
            epoch = Counter(tokens[start : start + total])
            assert epoch.most_common(1)[0][1] == 1
            assert sum(epoch.values()) == total or start + total > len(tokens)


@settings(max_examples=25, deadline=None)
@given(recipe=st.lists(stages(), min_size=1, max_size=3))
def test_restarts_steps_and_stages_split_in_two_change_nothing(folder: Path, recipe: list[Stage]) -> None:
    right = content(run(folder, recipe, restart=False))
    assert content(run(folder, recipe, restart=True)) == right
    assert content(run(folder, recipe, restart=False, one_by_one=True)) == right
    halves = []
    for stage in recipe:
        middle = len(stage.steps) // 2
        parts = [part for part in (stage.steps[:middle], stage.steps[middle:]) if part]
        halves += [Stage(stage.length, stage.packing, stage.names, stage.weights, part) for part in parts]
    assert content(run(folder, halves, restart=False)) == right


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), length=st.integers(2, 50), seed=st.integers(0, 99)
)
def test_best_fit_cuts_no_document_that_a_pack_can_hold(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int
) -> None:
    lengths = [*lengths, 2]
    documents = [list(range(2, 2 + size)) for size in lengths]
    prefix = write_corpus(tmp_path_factory.mktemp("c") / "c", documents)
    stream = opened(StreamConfig([prefix], length, "best_fit", seed, max_epochs={prefix: 2}))
    taken: list[PackPlan] = []
    while sum(plan.tokens for plan in taken) < 2 * sum(lengths):
        taken += stream.take(1, tokens=0)
    pieces = [(plan, piece) for plan in taken for piece in plan.pieces]
    for plan, piece in pieces:
        size = piece.end - piece.start
        if lengths[piece.document] <= length:
            assert (piece.offset, size) == (0, lengths[piece.document])
        else:
            assert size == length or piece.offset + size == lengths[piece.document]
        assert plan.tokens <= length
    assert Counter(document for _, document, _ in given_tokens(taken)) == {
        number: 2 * size for number, size in enumerate(lengths) if size
    }
    counts = stream.counts()
    long = sum(size > length for size in lengths)
    assert (counts.cut_documents, counts.documents) == (2 * long, 2 * sum(size > 0 for size in lengths))
    assert counts.padding == length * len(taken) - 2 * sum(lengths)
    with pytest.raises(ValueError, match=r"no corpus with a weight has a document left .*c after 2 epochs"):
        stream.take(1, tokens=0)


def test_ranks_of_any_number_share_out_the_same_packs(folder: Path) -> None:
    """Every rank plans all and reads its own: what they read together is what one reads."""
    config = StreamConfig([str(folder / "mixed"), str(folder / "long")], 8)
    alone = opened(config)
    right = [alone.read(plan).tokens.tolist() for plan in alone.take(24, tokens=0)]
    state = opened(config).state()
    for size in (1, 2, 3, 6):
        ranks = [opened(config, state=state) for _ in range(size)]
        found: dict[int, list[int]] = {}
        for step in range(4):
            for rank, stream in enumerate(ranks):
                plans = stream.take(6, tokens=48 * step)
                found |= {6 * step + at: stream.read(plans[at]).tokens.tolist() for at in range(rank, 6, size)}
        assert [found[number] for number in range(24)] == right
