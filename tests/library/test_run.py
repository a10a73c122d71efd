"""The library on a run: its page, the run's loss, packs and texts, the command, and a run in the same process."""

from __future__ import annotations

import doctest
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_m1
from megatron_m1.cli import run
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.stream import StreamConfig, open_stream
from megatron_m1.data.tokenizers.load import SentencePieceTokenizer
from megatron_m1.runtime.pool import WorkerPool
from tests.library import library_runs
from tests.library.conftest import STEPS, Reference, TrainedRun
from tests.training import loop_runs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
Corpus = dict[str, Any]


@pytest.fixture(scope="module")
def model(trained: TrainedRun) -> megatron_m1.Model:
    return megatron_m1.load(trained.folder)


def test_the_examples_of_the_page(trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name the run of ``make pretrain``, and say nothing that is not as true of a shorter one."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained.folder)
    monkeypatch.chdir(tmp_path)
    how = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    failed, examples = doctest.testfile(str(PAGE), module_relative=False, optionflags=how)
    assert failed == 0
    assert examples > 40
    page = PAGE.read_text()
    assert [name for name in megatron_m1.__all__ if name not in page] == []


def corpus_documents(prefix: str) -> list[list[int]]:
    """All documents of a corpus, read without the code under test; the corpora here end them with id 1."""
    tokens = np.fromfile(f"{prefix}.bin", np.uint16).tolist()
    ends = [0, *(at + 1 for at, token in enumerate(tokens) if token == 1)]
    return [tokens[start:end] for start, end in pairwise(ends)]


def test_loss_is_the_validation_loss_of_the_run(model: megatron_m1.Model, trained: TrainedRun) -> None:
    held_out = megatron_m1.packed_data(trained.folder, split="validation")
    assert len(held_out) == trained.config.train.eval_samples
    assert float(model.loss(held_out)) == pytest.approx(trained.summary["validation_loss"], rel=1e-6)
    each = torch.cat(model.loss(held_out, per_token=True))
    predicted = sum(float(pack.loss_mask.sum()) for pack in held_out)
    assert float(each.sum()) / predicted == pytest.approx(trained.summary["validation_loss"], rel=1e-5)


def test_a_run_its_checkpoint_and_its_export_are_one_model(
    model: megatron_m1.Model, trained: TrainedRun, tmp_path: Path
) -> None:
    assert run(["convert", "to-hf", str(trained.folder), str(tmp_path / "hub"), "--dtype", "fp32"]) == 0
    text = "def f(x):\n    return x + 1\n"
    right = model.logits(text)
    assert right.shape == (len(model.tokenizer.encode(text)), 504)  # type: ignore[union-attr]
    for path in (trained.folder / "checkpoints" / f"step_{STEPS:08d}", tmp_path / "hub"):
        same = megatron_m1.load(str(path))
        assert torch.equal(same.logits(text), right)
        assert same.parameter_counts.total == megatron_m1.parameter_counts(path).total
    assert model.config.train.max_steps == STEPS


def test_packs_of_a_run_are_those_of_its_stream(trained: TrainedRun, tiny_corpus: Corpus) -> None:
    data = megatron_m1.packed_data(trained.folder)
    prefixes, weights = parse_blend(tiny_corpus["train"])
    stream = open_stream(
        StreamConfig(prefixes, 64, seed=1234),
        tokenizer=data.tokenizer,
        weights=lambda tokens: weights,
        state=None,
        note=print,
    )
    for step in range(STEPS):
        plans = stream.take(4, tokens=4 * 64 * step)
        for ours, plan in zip(data[4 * step : 4 * step + 4], plans, strict=True):
            for name in ("tokens", "labels", "loss_mask", "cu_seqlens"):
                assert torch.equal(getattr(ours, name), getattr(stream.read(plan), name))
    assert (len(data), data.seq_length) == (4 * STEPS, 64)
    assert torch.equal(data[-1].tokens, data[len(data) - 1].tokens)
    with pytest.raises(IndexError):
        data[len(data)]
    other = megatron_m1.packed_data(trained.folder, seed=5, seq_length=32, num_samples=7)
    assert (len(other), len(other[0].tokens)) == (7, 32)


def test_packs_of_a_corpus_with_their_documents(tiny_corpus: Corpus) -> None:
    (prefix,) = tiny_corpus["train"]
    documents = corpus_documents(prefix)
    data = megatron_m1.packed_data(prefix, seq_length=100, tokenizer=tiny_corpus["tokenizer"])
    assert len(data) == sum(map(len, documents)) // 100, "one pass"
    seen = 0
    for pack in data:
        assert torch.equal(torch.cat([document.tokens for document in pack.documents]), pack.tokens)
        assert [document.end for document in pack.documents] == pack.cu_seqlens[1:].tolist()
        for document in pack.documents:
            assert document.corpus == prefix
            size = document.end - document.start
            assert document.tokens.tolist() == documents[document.index][document.offset : document.offset + size]
            assert document.text == data.tokenizer.decode(document.tokens.tolist())
        seen += len(pack.tokens)
    assert seen == 100 * len(data)
    first = max(data, key=lambda pack: len(pack.documents))
    assert repr(data) == f"<PackedData: {len(data)} packs of 100 tokens>"
    assert repr(first) == f"<Pack: 100 tokens, {len(first.documents)} documents>"
    piece = first.documents[1]
    size = piece.end - piece.start
    assert re.fullmatch(rf"<PackedDocument \d+ of .*: {size} tokens from {piece.offset}>", repr(piece))
    assert first in (data[0], first), "packs are compared by identity"
    assert torch.equal(data[-len(data)].tokens, data[0].tokens)
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match=f"pack {index} of {len(data)}: give one from -"):
            data[index]
    flowing = megatron_m1.packed_data(
        [prefix], seq_length=100, tokenizer=data.tokenizer, reset_at_documents=False, cache_folder=None
    )
    assert flowing[0].cu_seqlens.tolist() == [0, 100]
    assert [document.end for document in flowing[0].documents] == data[0].cu_seqlens[1:].tolist()


def test_texts(model: megatron_m1.Model, trained: TrainedRun, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what the library gives."""
    assert model.tokenizer is not None
    prompts = ["import ", "class Parser"]
    numbers: dict[str, Any] = dict(max_tokens=9, temperature=0.8, top_p=0.9, seed=3)
    texts = model.generate(prompts, **numbers)
    assert [generation.text for generation in texts] == [model.tokenizer.decode(found.ids) for found in texts]
    assert model.generate(prompts[0], **numbers) == texts[0]
    words = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run(["generate", str(trained.folder), "--prompt", prompts[0], *words]) == 0
    assert capsys.readouterr().out == f"{prompts[0]}{texts[0].text}\n"
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert run(["generate", str(trained.folder), *asked, *words, "--precision", "fp32"]) == 0
    shown = "".join(f"--- {prompt}\n{prompt}{found.text}\n" for prompt, found in zip(prompts, texts, strict=True))
    assert capsys.readouterr().out == shown


class Ending(SentencePieceTokenizer):
    """A tokenizer whose documents end with a token that the model is going to draw."""

    eod = 0


def test_a_document_that_ends_is_no_part_of_the_text(model: megatron_m1.Model, trained: TrainedRun) -> None:
    numbers: dict[str, Any] = dict(max_tokens=8, temperature=1.0, seed=3)
    going_on = model.generate("x", **numbers).ids
    tokenizer = Ending(Path(trained.config.data.tokenizer))
    tokenizer.eod = going_on[5]
    ending = megatron_m1.load(trained.folder, tokenizer=tokenizer).generate("x", **numbers)
    assert ending.ids == going_on[: going_on.index(going_on[5])]
    assert ending.text == tokenizer.decode(ending.ids)


def test_models_beside_a_mesh_that_trains(workers: WorkerPool, reference: Reference) -> None:
    config = library_runs.meshed_config()
    alone = workers.run(library_runs.losses_around_a_question, config, None, world_size=2)
    beside = workers.run(library_runs.losses_around_a_question, config, reference.folder, world_size=2)
    right = megatron_m1.load(reference.folder).logits(library_runs.QUESTION)
    for (losses, _), (same, answers) in zip(alone, beside, strict=True):
        assert same == losses, "the run does not notice"
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        torch.testing.assert_close(answers[0], right, rtol=1e-5, atol=1e-5)


def test_a_whole_run_in_the_same_process(
    workers: WorkerPool, reference: Reference, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    settings = loop_runs.write_settings(
        tmp_path / "run.yaml", tiny_corpus, tmp_path / "run", ("train.max_steps", 1), ("train.eval_samples", 0)
    )
    (answers,) = workers.run(
        library_runs.answers_around_a_run, reference.folder, settings, world_size=1, process_group=False
    )
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])
