"""N-gram baselines against dictionaries and loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m1.data.packed import PackedSample, build_packed_dataset
from megatron_m1.evaluation.ngrams import ngram_entropy
from tests.data.corpora import FakeTokenizer, write_corpus

VOCAB = 23


def random_documents(seed: int, count: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB - 3, generator.integers(1, 12)).tolist() for _ in range(count)]


def pack(documents: list[list[int]]) -> PackedSample:
    """One pack of whole documents, its mask from the definition."""
    tokens = [token for document in documents for token in document]
    opens = [place == 0 for document in documents for place in range(len(document))]
    mask = [0.0 if opens_next else 1.0 for opens_next in opens[1:]]
    bounds = np.cumsum([0] + [len(document) for document in documents])
    bounds[-1] -= 1
    return PackedSample(
        torch.tensor(tokens[:-1]), torch.tensor(tokens[1:]), torch.tensor(mask), torch.tensor(bounds, dtype=torch.int32)
    )


def pairs_of(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter(pair for document in documents for pair in itertools.pairwise(document))


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3)])
def test_against_counting_by_hand(tmp_path: Path, shares: tuple[float, ...]) -> None:
    sources = [random_documents(seed, 60 * (seed + 1)) for seed in range(len(shares))]
    blend = []
    for k, (documents, share) in enumerate(zip(sources, shares, strict=True)):
        blend += [str(share), write_corpus(tmp_path / str(k), documents)]
    held_out = [random_documents(seed, 15) for seed in (7, 8)]
    held_out[0].append([VOCAB - 1, 2, VOCAB - 1, VOCAB - 2])  # ids and contexts that training never saw

    total = sum(pairs_of(documents).total() for documents in sources)
    weighted: Counter[tuple[int, int]] = Counter()
    for documents, share in zip(sources, shares, strict=True):
        counts = pairs_of(documents)
        for pair, count in counts.items():
            weighted[pair] += share * count * total / counts.total()  # type: ignore[assignment]
    scored = list(pairs_of([d for documents in held_out for d in documents]).elements())
    unigram = bigram = 0.0
    for a, b in scored:
        p = (sum(c for (_, y), c in weighted.items() if y == b) + 1) / (total + VOCAB)
        context = sum(c for (x, _), c in weighted.items() if x == a)
        followers = sum(x == a for (x, _) in weighted)
        unigram -= math.log(p) / len(scored)
        bigram -= math.log((weighted[a, b] + followers * p) / (context + followers) if followers else p) / len(scored)

    entropy = ngram_entropy(blend, [pack(documents) for documents in held_out], vocab_size=VOCAB)
    assert entropy.scored_tokens == len(scored)
    # Sums of some hundred terms in float64: 1e-12 is far above their rounding.
    assert entropy.unigram == pytest.approx(unigram, rel=1e-12)
    assert entropy.bigram == pytest.approx(bigram, rel=1e-12)


def test_known_values(tmp_path: Path) -> None:
    """A stream of a fixed cycle: next to nothing is left to guess after one token, log 4 without it."""
    prefix = write_corpus(tmp_path / "c", [[0, 1, 2, 3] * 5000])
    dataset = build_packed_dataset(
        [prefix],
        sequence_length=400,
        num_samples=3,
        seed=0,
        tokenizer=FakeTokenizer(4),
        cache_folder=tmp_path / "cache",
    )
    entropy = ngram_entropy([prefix], [dataset[i] for i in range(3)], vocab_size=4)
    assert entropy.unigram == pytest.approx(math.log(4), abs=1e-3)
    assert 0 <= entropy.bigram < 1e-3
    assert entropy.scored_tokens == 1200


def test_only_the_start_is_counted(tmp_path: Path) -> None:
    long = write_corpus(tmp_path / "long", [[0, 1, 0, 1], [2, 3, 2, 3, 2], [4, 5]])
    short = write_corpus(tmp_path / "short", [[0, 1, 0, 1], [2, 3]])
    held_out = [pack([[0, 1, 2, 3], [4, 5, 1]])]
    cut = ngram_entropy([long], held_out, vocab_size=6, max_train_tokens=6)
    assert cut == ngram_entropy([short], held_out, vocab_size=6)


def test_wrong_inputs(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[0, 9, 4]])
    singles = write_corpus(tmp_path / "singles", [[1], [2]])
    held_out = [pack([[0, 1, 2]])]
    with pytest.raises(ValueError, match="no held-out label"):
        ngram_entropy([prefix], [], vocab_size=10)
    with pytest.raises(ValueError, match="has token 9, not below the vocabulary size 9"):
        ngram_entropy([prefix], held_out, vocab_size=9)
    with pytest.raises(ValueError, match="a held-out token id is not below the vocabulary size 2"):
        ngram_entropy([prefix], held_out, vocab_size=2)
    with pytest.raises(ValueError, match="singles has no document of 2 tokens"):
        ngram_entropy([singles], held_out, vocab_size=10)
