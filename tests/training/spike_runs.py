"""Runs whose data have garbage in them, where the tests want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_m1.data.stream import StreamConfig, open_stream
from megatron_m1.data.tokenizers import load_tokenizer
from tests.data.corpora import write_corpus
from tests.training import loop_runs as runs
from tests.training.loop_runs import Setting

SPIKE = 9
"""Step of the first spike."""
SECOND = 17
"""Batch of the second one."""
BATCHES = 21
"""That the longest run takes, some of which it leaves out."""
BATCH, SEQUENCE = 4, 64
"""Packs of a batch, and tokens of a pack."""
GUARD: list[Setting] = [
    *[("train.spike_factor", 2.0), ("train.spike_window", 8), ("train.eval_interval", 0)],
    ("train.max_steps", SPIKE),
]
"""The gradient norms of the text are within a fifth of one another, those of the garbage are three times as great."""


def garbage_data(folder: Path, tiny_corpus: dict[str, Any]) -> dict[str, Any]:
    """``data`` settings: text, and two corpora of documents of one token over and over, each of which gives a pack.

    Which corpus gives which pack depends on the blend alone, whatever the documents are and however they are packed:
    the stream is asked for a blend with one pack of garbage in the batch of ``SPIKE`` and one in ``SECOND``.
    """
    tokenizer = load_tokenizer(tiny_corpus["tokenizer"])
    prefixes = []
    for name, token in (("garbage", 7), ("rubbish", 9)):
        documents = [[*[token + index % 2] * 70, tokenizer.eod] for index in range(40)]
        prefixes.append(write_corpus(folder / name, documents, tokenizer_digest=tokenizer.digest()))
    for share in (0.0080 + index * 0.0001 for index in range(50)):
        blend = [1.0 - 2 * share, *tiny_corpus["train"], share, prefixes[0], share, prefixes[1]]
        if batches_with(prefixes, blend, tiny_corpus["tokenizer"]) == [SPIKE, SECOND]:
            return {"train": blend, "tokenizer": tiny_corpus["tokenizer"]}
    raise AssertionError("no blend has its garbage where the tests want it")


def batches_with(prefixes: list[str], blend: list[Any], tokenizer: str) -> list[int]:
    """Which batches of a run, from 1 to ``BATCHES``, have packs of some corpora, once for every pack."""
    stream = open_stream(
        StreamConfig(blend[1::2], SEQUENCE),
        tokenizer=load_tokenizer(tokenizer),
        weights=lambda tokens: blend[::2],
        state=None,
        note=print,
    )
    plans = stream.take(BATCHES * BATCH, tokens=0)
    found = [any(piece.corpus in prefixes for piece in plan.pieces) for plan in plans]
    return [1 + index // BATCH for index, is_in in enumerate(found) if is_in]


def said(rank: int, world_size: int, path: Path) -> tuple[int, str]:
    """Status and standard output of the command."""
    return runs.command(rank, world_size, ["pretrain", "--config", str(path)])


def steps_of(folder: Path, name: str) -> list[Any]:
    """One field of every record."""
    return [line[name] for line in runs.records(folder)]


def documents(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a run wrote of the documents of a spike."""
    return [json.loads(line) for line in (folder / "spikes" / f"{name}.jsonl").read_text().splitlines()]
