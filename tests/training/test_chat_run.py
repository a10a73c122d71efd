"""Fine-tuning from end to end: conversations are tokenised, and training minimises what the assistant says in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_m1 import cli
from megatron_m1.data.packed import DocumentPiece
from megatron_m1.data.stream import StreamConfig, open_stream
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.trained_model import build_chunks
from tests.data.chats import documents, m2_folder, said, write_rows
from tests.training import loop_runs as runs
from tests.training.test_loop import MESH_TOLERANCE

LENGTH, BATCH, STEPS = 128, 4, 4


def conversations() -> list[dict[str, Any]]:
    """Of 20, every third has two answers; one is longer than a pack."""
    rows: list[dict[str, Any]] = []
    for number in range(20):
        answer = f"It is {number} times {number}: {number * number}." + " So it is." * (
            30 if number == 7 else number % 4
        )
        turns = [said("user", f"What is the square of {number}?"), said("assistant", answer)]
        turns += [said("user", "Sure?"), said("assistant", "Yes.")] if number % 3 == 0 else []
        rows.append({"messages": turns})
    return rows


def loss_by_hand(rank: int, world_size: int, settings: Path, packs: list[list[DocumentPiece]]) -> tuple[float, int]:
    """Mean over conversations of the mean loss of their learnt labels, and how many labels that are.

    Each piece alone goes through the model as a run draws it; what is learnt is read from the corpus itself.
    """
    config = runs.config_of(settings, world_size)
    (model,) = build_chunks(config, mesh.initialise(config.parallel, seed=config.train.seed))
    corpus = documents(Path(config.data.train[0]))
    means, labels = [], 0
    for piece in (piece for pack in packs for piece in pack):
        ids, learnt = corpus[piece.document]
        tokens = torch.tensor(ids[piece.offset :][: piece.end - piece.start])
        following = torch.tensor(ids[piece.offset + 1 :][: len(tokens)])
        counts = torch.tensor(learnt[piece.offset + 1 :][: len(tokens)]) == 1
        params = PackedBatchParams.of(SequenceLayout.build(torch.tensor([0, len(tokens)], dtype=torch.int32)))
        with torch.no_grad():
            logits = model(tokens[None], None, None, packed_seq_params=params, runtime_gather_output=True)[0]
        losses = cross_entropy(logits[: len(following)], following, reduction="none")
        if counts.any():
            means.append(losses[counts].mean())
        labels += int(counts.sum())
    return float(torch.stack(means).mean()), labels


@pytest.mark.slow
def test_training_learns_what_the_assistant_says(workers: WorkerPool, tmp_path: Path) -> None:
    tokenizer, prefix = m2_folder(tmp_path / "tokenizer"), tmp_path / "chats"
    chats = write_rows(tmp_path / "chats.jsonl", conversations())
    words = ["tokenize", str(chats), "--chat", "--tokenizer", str(tokenizer), "--output", str(prefix), "--workers", "1"]
    assert cli.run(words) == 0
    assert len(documents(prefix)) == 20
    settings = runs.write_settings(
        tmp_path / "run.yaml",
        {"train": [str(prefix)], "validation": [], "tokenizer": str(tokenizer), "packing": "best_fit"},
        tmp_path / "run",
        *[("data.seq_length", LENGTH), ("train.global_batch_size", BATCH), ("train.max_steps", STEPS)],
        *[("train.loss_normalization", "sample"), ("optimizer.lr_warmup_tokens", 0), ("optimizer.lr", 1e-2)],
    )
    words = ["pretrain", "--config", str(settings)]
    ((status, _),) = workers.run(runs.command, words, world_size=1, process_group=False)
    assert status == 0
    steps = runs.records(tmp_path / "run")

    # The packs that the run had, from a stream of its own.
    config = StreamConfig([str(prefix)], LENGTH, "best_fit", runs.config_of(settings, 1).train.seed)
    stream = open_stream(
        config, tokenizer=load_tokenizer(tokenizer), weights=lambda tokens: [1.0], state=None, note=print
    )
    plans = stream.take(BATCH * STEPS, tokens=0)
    pieces = [plan.pieces for plan in plans]
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    lengths = [len(ids) for ids, _ in documents(prefix)]
    begun = [piece for pack in pieces for piece in pack if piece.offset == 0]
    cut = sum(piece.end - piece.start < lengths[piece.document] for piece in begun)
    assert state["stream"]["documents"] == len(begun) > 20, "all of them, and some again"
    assert state["stream"]["cut_documents"] == cut >= 1 == sum(length > LENGTH for length in lengths)

    first = pieces[:BATCH]
    ((loss, labels),) = workers.run(loss_by_hand, settings, first, world_size=1)
    assert steps[0]["loss"] == pytest.approx(loss, rel=MESH_TOLERANCE)
    assert sum(int(stream.read(plan).loss_mask.sum()) for plan in plans[:BATCH]) == labels > 50
    assert labels < sum(len(documents(prefix)[piece.document][1]) for pack in first for piece in pack) / 2
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
