"""Unigram and bigram baselines of a language model: nats per token of the same held-out labels that its loss scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import open_tokens
from megatron_m1.data.packed import PackedSample

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NgramEntropy:
    """Nats per scored label of the held-out packs."""

    unigram: float
    """Cross-entropy under the training data's unigram counts: what a model that ignores its context can reach."""
    bigram: float
    """Cross-entropy under the training data's bigram counts: what a model that sees one token can reach."""
    scored_tokens: int
    """Held-out labels that were scored."""


def ngram_entropy(
    train_blend: Sequence[str],
    held_out: Iterable[PackedSample],
    *,
    vocab_size: int,
    max_train_tokens: int = 20_000_000,
) -> NgramEntropy:
    """Score held-out packs with n-gram models of the training blend.

    Predictions across a document's end are left out on both sides, as the loss mask does. With counts c of the pairs
    (a, b) inside training documents, N of them in all, and V ids:

    - unigram: p(b) = (c(b) + 1) / (N + V), c(b) the pairs that end in b;
    - bigram (Witten-Bell): p(b|a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a)), t(a) the number of different followers of
      a; p(b) after an a that training never saw.

    The counts of each source are scaled so that the sources have the blend's shares and N stays.

    Args:
        train_blend: as for ``packed.build_packed_dataset``.
        held_out: validation packs; labels with ``loss_mask`` 0 are not scored.
        vocab_size: V; every id is below it.
        max_train_tokens: counted from the start of each source.

    Raises:
        ValueError: nothing to score, nothing to count, a corpus is damaged, or an id is not below ``vocab_size``.
    """
    before, labels = _scored_pairs(held_out)
    if labels.size == 0:
        raise ValueError("no held-out label is left to score; give at least one pack with documents of 2 tokens")
    if max(before.max(), labels.max()) >= vocab_size:
        raise ValueError(
            f"a held-out token id is not below the vocabulary size {vocab_size}; use the corpus's own tokenizer"
        )
    keys, counts = _train_counts(train_blend, vocab_size, max_train_tokens)
    total = float(counts.sum())
    unigram = (np.bincount(keys % vocab_size, weights=counts, minlength=vocab_size) + 1.0) / (total + vocab_size)  # [V]
    context = np.bincount(keys // vocab_size, weights=counts, minlength=vocab_size)  # [V]
    followers = np.bincount(keys // vocab_size, minlength=vocab_size).astype(np.float64)  # [V]
    wanted = before * vocab_size + labels
    places = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    pair = np.where(keys[places] == wanted, counts[places], 0.0)
    seen = followers[before]
    norm = context[before] + seen
    smoothed = pair + seen * unigram[labels]
    bigram = np.where(norm > 0.0, smoothed / np.where(norm > 0.0, norm, 1.0), unigram[labels])
    return NgramEntropy(
        unigram=float(-np.log(unigram[labels]).mean()),
        bigram=float(-np.log(bigram).mean()),
        scored_tokens=int(labels.size),
    )


def _scored_pairs(held_out: Iterable[PackedSample]) -> tuple[IntArray, IntArray]:
    """Tokens and labels [scored] of all positions whose loss counts."""
    before, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for sample in held_out:
        scored = sample.loss_mask.numpy() > 0
        before.append(sample.tokens.numpy()[scored])
        labels.append(sample.labels.numpy()[scored])
    return np.concatenate(before), np.concatenate(labels)


def _train_counts(blend: Sequence[str], vocab_size: int, max_tokens: int) -> tuple[IntArray, FloatArray]:
    """Pairs of neighbours inside training documents: sorted keys a x V + b [pairs], weighted counts [pairs]."""
    prefixes, weights = parse_blend(blend)
    sources = [np.unique(_document_pairs(prefix, vocab_size, max_tokens), return_counts=True) for prefix in prefixes]
    totals = [int(counts.sum()) for _, counts in sources]
    if min(totals) == 0:
        raise ValueError(f"{prefixes[totals.index(0)]} has no document of 2 tokens; drop it from the blend")
    scales = [weight * sum(totals) / total for weight, total in zip(weights, totals, strict=True)]
    keys, places = np.unique(np.concatenate([keys for keys, _ in sources]), return_inverse=True)
    scaled = np.concatenate([counts * scale for (_, counts), scale in zip(sources, scales, strict=True)])
    return keys, np.bincount(places, weights=scaled, minlength=keys.size)


def _document_pairs(prefix: str, vocab_size: int, max_tokens: int) -> IntArray:
    """a x V + b of all neighbours (a, b) of one document in the first ``max_tokens`` tokens [pairs]."""
    mapped, lengths = open_tokens(prefix)
    tokens = mapped[:max_tokens].astype(np.int64)
    if tokens.max() >= vocab_size:
        raise ValueError(f"{prefix} has token {tokens.max()}, not below the vocabulary size {vocab_size}")
    starts = np.cumsum(lengths, dtype=np.int64)
    opens_document = np.zeros(tokens.size, dtype=bool)
    opens_document[starts[starts < tokens.size]] = True
    return (tokens[:-1] * vocab_size + tokens[1:])[~opens_document[1:]]
