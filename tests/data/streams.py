"""Streams over small corpora, and what any pack of one must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_m1.data.packed import PackedSample
from megatron_m1.data.stream import PackPlan, Stream, StreamConfig, open_stream
from tests.data.corpora import FakeTokenizer


def opened(
    config: StreamConfig,
    *,
    state: Mapping[str, Any] | None = None,
    weights: Callable[[int], Sequence[float]] | None = None,
    notes: list[str] | None = None,
) -> Stream:
    """A stream whose corpora are equals unless told."""
    return open_stream(
        config,
        tokenizer=FakeTokenizer(),
        weights=weights or (lambda tokens: [1.0] * len(config.prefixes)),
        state=state,
        note=(notes if notes is not None else []).append,
    )


def fields(sample: PackedSample) -> list[list[Any]]:
    return [getattr(sample, name).tolist() for name in ("tokens", "labels", "loss_mask", "cu_seqlens")]


def check_pack(sample: PackedSample, plan: PackPlan, documents: Sequence[Sequence[int]]) -> None:
    """Rebuild a pack from its pieces, token by token."""
    n, tokens = plan.length, 0
    labels = sample.labels.tolist()
    for piece in plan.pieces:
        assert piece.start == tokens and piece.end > piece.start
        whole = documents[piece.document]
        stop = piece.offset + piece.end - piece.start
        assert sample.tokens[piece.start : piece.end].tolist() == list(whole[piece.offset : stop])
        goes_on = stop < len(whole)
        assert labels[piece.start : piece.end - 1] == list(whole[piece.offset + 1 : stop])
        assert not goes_on or labels[piece.end - 1] == whole[stop]
        expected = [1.0] * (piece.end - piece.start - 1) + [1.0 if goes_on else 0.0]
        assert sample.loss_mask[piece.start : piece.end].tolist() == expected
        assert not goes_on or piece is plan.pieces[-1] or piece.end == n
        tokens = piece.end
    padding = [n] if tokens < n else []
    assert sample.cu_seqlens.tolist() == [0, *(piece.end for piece in plan.pieces), *padding]
    assert sample.real_tokens == (tokens if padding else None)
    assert plan.tokens == tokens
    assert not sample.tokens[tokens:].any() and not sample.labels[tokens:].any() and not sample.loss_mask[tokens:].any()
    assert (sample.tokens.dtype, sample.labels.dtype) == (torch.int64, torch.int64)
    assert (sample.loss_mask.dtype, sample.cu_seqlens.dtype) == (torch.float32, torch.int32)
    assert {len(sample.tokens), len(sample.labels), len(sample.loss_mask)} == {n}


def given_tokens(plans: Sequence[PackPlan]) -> list[tuple[str, int, int]]:
    """(corpus, document, token of it) in the order in which they are given."""
    return [
        (piece.corpus, piece.document, piece.offset + at)
        for plan in plans
        for piece in plan.pieces
        for at in range(piece.end - piece.start)
    ]
