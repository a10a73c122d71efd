"""``tokenize --length-buckets``: one pass, a corpus for the documents of some lengths, each known for what it is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_m1 import cli
from megatron_m1.data.corpora.prefix import check_prefix, open_tokens
from megatron_m1.data.tokenize import tokenize_corpus
from megatron_m1.data.tokenize.buckets import NO_BUCKETS, parse_length_buckets
from megatron_m1.data.tokenize.split import WHOLE, parse_split
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece

BUCKETS = parse_length_buckets("5,20")
NAMES = ("out_up_to_5", "out_up_to_20", "out_over_20")
LINES = "".join(f"line {i} of a text that comes in parts\n" for i in range(16_000))
"""More than a batch: such a document comes in parts, and the last one tells its length."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece([LINES[:20_000]], path, vocab_size=300)
    return path


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(prefix: Path, model: Path) -> list[str]:
    tokens, lengths = open_tokens(str(prefix))
    decode = load_tokenizer(model).decode
    return [decode(ids[:-1].tolist()) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_every_document_is_in_the_bucket_of_its_length(tmp_path: Path, model: Path) -> None:
    """Of 1 to 60 tokens, end mark included, and a large one that comes in parts in between."""
    tokenizer = load_tokenizer(model)
    texts = ["\n" * (1 + i % 60) + "!" for i in range(130)]
    texts.insert(70, LINES)
    path = write(tmp_path / "a.jsonl", texts)
    report = tokenize_corpus([path], tmp_path / "out", model, buckets=BUCKETS, workers=1)
    lengths = {text: len(tokenizer.encode(text)) + 1 for text in texts}
    expected = [
        [text for text in texts if low < lengths[text] <= high] for low, high in ((0, 5), (5, 20), (20, 1 << 30))
    ]
    assert 5 in lengths.values()
    assert 20 in lengths.values()
    assert [texts_of(tmp_path / name, model) for name in NAMES] == expected

    for name, kept, bucket in zip(NAMES, expected, ((0, 5), (5, 20), (20, None)), strict=True):
        sidecar = json.loads((tmp_path / f"{name}.json").read_text())
        assert sidecar["bucket"] == {"longer_than": bucket[0], "up_to": bucket[1]}
        assert sidecar["text_bytes"] == sum(map(len, kept))
        assert "loss_mask" not in sidecar
        summary = check_prefix(str(tmp_path / name), tokenizer_digest=tokenizer.digest())
        sizes = sorted(lengths[text] for text in kept)
        assert (summary.documents, summary.tokens) == (len(kept), sum(sizes))
        line = f"{tmp_path / name}: {len(kept)} documents, {sum(sizes):,} tokens, "
        assert f"{line}{sizes[0]:,} to {sizes[-1]:,} each, median {sizes[len(sizes) // 2]:,}" in str(report)
    assert (report.documents, report.tokens) == (131, sum(lengths[text] for text in texts))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["a.jsonl", *(f"{name}{suffix}" for name in NAMES for suffix in (".bin", ".idx", ".json"))]
    )


def test_buckets_of_a_split(tmp_path: Path, model: Path) -> None:
    """The parts are those of the split alone, each in buckets, whoever tokenises."""
    path = write(tmp_path / "a.jsonl", [f"{i} " * (1 + i % 12) for i in range(300)] + [LINES])
    split = parse_split("2,1")
    tokenize_corpus([path], tmp_path / "whole", model, split=split, workers=1)
    files = []
    for workers in (1, 2):
        report = tokenize_corpus([path], tmp_path / "out", model, split=split, buckets=BUCKETS, workers=workers)
        files.append({file.name: file.read_bytes() for file in tmp_path.glob("out*")})
    assert files[0] == files[1]
    for part in ("", "_validation"):
        found = [text for name in NAMES for text in texts_of(tmp_path / f"{name}{part}", model)]
        assert sorted(found) == sorted(texts_of(tmp_path / f"whole{part}", model))
    assert json.loads((tmp_path / "out_over_20_validation.json").read_text())["split"]["part"] == "validation"
    assert [bucket.prefix for bucket in report.buckets] == [
        f"{tmp_path / name}{part}" for part in ("", "_validation") for name in NAMES
    ]
    assert sum(held.documents for held in report.held_out) == len(texts_of(tmp_path / "whole_validation", model))


def test_an_empty_bucket_leaves_no_corpus_and_an_old_one_goes(tmp_path: Path, model: Path) -> None:
    short, long = write(tmp_path / "s.jsonl", ["a", "b"]), write(tmp_path / "l.jsonl", ["a", "x y z " * 20])
    tokenize_corpus([long], tmp_path / "out", model, buckets=BUCKETS, workers=1)
    assert sorted(file.stem for file in tmp_path.glob("*.idx")) == ["out_over_20", "out_up_to_5"]
    report = tokenize_corpus([short], tmp_path / "out", model, buckets=BUCKETS, workers=1)
    assert sorted(file.name for file in tmp_path.glob("out*")) == [
        "out_up_to_5.bin",
        "out_up_to_5.idx",
        "out_up_to_5.json",
    ]
    assert f"{tmp_path / 'out_over_20'}: no document of these lengths, so no such corpus" in str(report)


def test_somebodys_file_stays_and_older_corpora_are_named(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "x y z " * 20])
    (tmp_path / "out_up_to_20.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"out_up_to_20\.bin is there, and not by megatron-m1 tokenize"):
        tokenize_corpus([path], tmp_path / "out", model, buckets=BUCKETS, workers=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out_up_to_20.bin"]
    (tmp_path / "out_up_to_20.bin").unlink()
    # Documents of somebody, whose name could be a bucket's.
    write(tmp_path / "out_up_to_9.json", ["theirs"])
    notes: list[str] = []
    for buckets in (NO_BUCKETS, BUCKETS, parse_length_buckets("7,20")):
        tokenize_corpus([path], tmp_path / "out", model, buckets=buckets, split=WHOLE, workers=1, note=notes.append)
    out = tmp_path / "out"
    without = f"{out} is of an earlier run without --length-buckets, and has the same documents: remove it"
    assert notes == [
        without,
        without,
        f"{out}_up_to_5 is of earlier --length-buckets, and documents of it may be in another corpus of {out} now: "
        "remove it, or name the same buckets",
    ]


@pytest.mark.parametrize("text", ["", "a", "5,", "0", "-1", "5,5", "20,5", "1e3", "2147483648"])
def test_wrong_buckets_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+ rising numbers of tokens, such as 32768,131072$"):
        parse_length_buckets(text)


def test_the_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", ["a", "x y z " * 20])
    words = ["tokenize", tmp_path / "a.jsonl", "--tokenizer", model, "--output", tmp_path / "out", "--workers", "1"]
    arguments = list(map(str, words))
    assert cli.exit_status(lambda: cli.run([*arguments, "--length-buckets", "5,20"])) == 0
    assert f"{tmp_path / 'out_up_to_5'}: 1 document, 2 tokens, 2 to 2 each, median 2" in capsys.readouterr().out
    assert cli.exit_status(partial(cli.run, [*arguments, "--length-buckets", "20,5"])) == 2
    assert "argument --length-buckets: '20,5': give rising" in capsys.readouterr().err
