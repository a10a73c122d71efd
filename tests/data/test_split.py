"""Holding documents out: which ones, whoever tokenises them and in whatever order, and what the files then say."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_m1 import cli
from megatron_m1.data.corpora.prefix import check_prefix, open_tokens
from megatron_m1.data.tokenize import tokenize_corpus
from megatron_m1.data.tokenize.find import file_kind, text_suffix
from megatron_m1.data.tokenize.split import Split, joined_mark, parse_split, text_mark
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece

SENTENCE = "The quick brown fox jumps over the lazy dog number {}.\n"
SPLIT = parse_split("8,1.5,0.5")
PARTS = ("", "_validation", "_test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([SENTENCE.format(i) for i in range(100)], path, vocab_size=300)
    return path


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def documents_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    tokens, lengths = open_tokens(str(prefix))
    ends = np.cumsum(lengths)
    assert all(tokens[end - 1] == tokenizer.eod for end in ends)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends[:-1])]


def test_every_document_is_in_one_part_whoever_tokenises_in_whatever_order(tmp_path: Path, model: Path) -> None:
    """Among them one that is so large that it comes in parts, and is held out; and one that comes twice."""
    rows = random.Random(7)
    texts = [SENTENCE.format(i) * (1 + i % 5) for i in range(400)]
    large = next(
        text for text in (SENTENCE.format(f"large {i}") * 12_000 for i in range(100)) if part_of(text, SPLIT) == 1
    )
    texts += [large, texts[17]]
    write_lines(tmp_path / "a.jsonl", texts)
    rows.shuffle(texts)
    write_lines(tmp_path / "b1.jsonl", texts[:250])
    write_lines(tmp_path / "b2.jsonl", texts[250:])
    tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "a", model, split=SPLIT, workers=1)
    report = tokenize_corpus(
        [tmp_path / "b2.jsonl", tmp_path / "b1.jsonl"], tmp_path / "b", model, split=SPLIT, workers=2
    )

    tokenizer = load_tokenizer(model)
    found = {part: documents_of(Path(f"{tmp_path / 'a'}{part}"), tokenizer) for part in PARTS}
    assert sorted(text for held in found.values() for text in held) == sorted(texts)
    assert {part: [part_of(text, SPLIT) for text in held] for part, held in found.items()} == {
        part: [number] * len(found[part]) for number, part in enumerate(PARTS)
    }
    assert large in found["_validation"]
    assert sum(text == texts[0] for held in found.values() for text in held) == texts.count(texts[0])
    for part in PARTS:
        assert sorted(documents_of(Path(f"{tmp_path / 'b'}{part}"), tokenizer)) == sorted(found[part]), part
    assert [(held.prefix, held.documents) for held in report.held_out] == [
        (f"{tmp_path / 'b'}{part}", len(found[part])) for part in PARTS[1:]
    ]
    assert f"{tmp_path / 'b_validation'}: {len(found['_validation'])} documents" in str(report)
    # Shares of 402 documents, give or take four standard deviations.
    assert abs(report.documents - 0.8 * 402) < 4 * (402 * 0.8 * 0.2) ** 0.5


def part_of(text: str, split: Split) -> int:
    return int(split.part_of(np.array([text_mark(text)], dtype=np.uint64))[0])


def test_sidecars_tell_of_the_part(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [SENTENCE.format(i) for i in range(100)])
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"content": "x", "id": 1}\n')
    digest = load_tokenizer(model).digest()
    report = tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "out", model, split=parse_split("0.9,0.1"), workers=1)
    train, held_out = (
        check_prefix(f"{tmp_path / name}", tokenizer_digest=digest) for name in ("out", "out_validation")
    )
    assert train.documents + held_out.documents == 100
    assert (report.documents, report.tokens) == (train.documents, train.tokens)
    sidecars = [json.loads((tmp_path / f"out{part}.json").read_text()) for part in PARTS[:2]]
    assert [sidecar["split"]["part"] for sidecar in sidecars] == ["train", "validation"]
    assert [sidecar["skipped"] for sidecar in sidecars] == [{"key missing": 1}, {}]
    assert sum(sidecar["text_bytes"] for sidecar in sidecars) == sum(len(SENTENCE.format(i)) for i in range(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.jsonl", *(f"out{part}{suffix}" for part in PARTS[:2] for suffix in (".bin", ".idx", ".json"))]
    )


def test_an_empty_part_and_a_stale_one_are_said(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "few.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"--split gives the validation part 1e-06 of 2 documents, and by chance none"):
        tokenize_corpus([tmp_path / "few.jsonl"], tmp_path / "out", model, split=parse_split("999999,1"), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
    write_lines(tmp_path / "many.jsonl", [SENTENCE.format(i) for i in range(50)])
    tokenize_corpus([tmp_path / "many.jsonl"], tmp_path / "out", model, split=parse_split("1,1"), workers=1)
    notes: list[str] = []
    tokenize_corpus([tmp_path / "many.jsonl"], tmp_path / "out", model, workers=1, note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith(f"{tmp_path / 'out_validation'} is of an earlier --split")


def test_somebodys_held_out_file_is_not_replaced(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [SENTENCE.format(i) for i in range(50)])
    (tmp_path / "out_validation.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"out_validation\.bin is there, and not by megatron-m1 tokenize"):
        tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "out", model, split=parse_split("1,1"), workers=1)
    assert (tmp_path / "out_validation.bin").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.99,0.01", (0.99, 0.01)),
        ("969,30,1", (0.969, 0.03, 0.001)),
        ("3,0,1", (0.75, 0.0, 0.25)),
        ("1,0", (1.0, 0.0)),
    ],
)
def test_shares(text: str, shares: tuple[float, ...]) -> None:
    split = parse_split(text)
    assert split.shares == pytest.approx(shares)
    marks = np.arange(20_000, dtype=np.uint64) * np.uint64(997)
    found = np.bincount(split.part_of(marks), minlength=len(shares)) / len(marks)
    assert found == pytest.approx(shares, abs=0.015)
    assert [part for part in range(len(shares)) if found[part]] == split.parts


@pytest.mark.parametrize("text", ["", "1", "a,b", "0,1", "0.9,-0.1", "1,nan", "1,inf", "1,2,3,4", "1e308,1e308,1e308"])
def test_wrong_shares_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_split(text)


def test_a_larger_share_holds_out_what_a_smaller_one_did() -> None:
    marks = np.arange(5_000, dtype=np.uint64)
    small, large = (parse_split(text).part_of(marks) == 1 for text in ("0.99,0.01", "0.9,0.1"))
    assert small.any()
    assert not (small & ~large).any()


def test_the_mark_of_a_text_follows_from_its_parts() -> None:
    text = "naïve 🙂\n" * 999 + "\0end"
    for at in (0, 1, 500, len(text)):
        tail = text[at:]
        assert joined_mark(text_mark(text[:at]), text_mark(tail), len(tail.encode())) == text_mark(text)


def test_keys_that_were_there_are_named(tmp_path: Path, model: Path) -> None:
    lines = ['{"content": "x", "id": 1}', json.dumps({"body": "x" * 2_000_000}), json.dumps({"k" * 99: 1})]
    for line, named in zip(lines, ('"content", "id"', '"body"', '"kkk'), strict=True):
        (tmp_path / "a.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="no document that can be used") as caught:
            tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "out", model, workers=1)
        assert f"1 key missing (the first such record has {named}" in str(caught.value)
        assert "--text-key" in str(caught.value)
        assert len(str(caught.value)) < 400
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + lines[0] + "\n{}\n")
    report = tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "out", model, workers=1)
    assert 'skipped: 2 key missing (the first such record has "content", "id")' in str(report)


def test_files_of_other_suffixes_are_taken_as_text_when_asked_for(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.py", "c.PY", "d.rs", "e.png"):
        (folder / name).write_text(f"text of {name}")
    report = tokenize_corpus([folder], tmp_path / "out", model, workers=1, text_suffixes=[".py", ".rs"])
    assert documents_of(tmp_path / "out", load_tokenizer(model)) == [
        f"text of {n}" for n in ("a.txt", "b.py", "c.PY", "d.rs")
    ]
    assert str(report).startswith(f"passed over in {folder}: 1 .png (--suffix .EXT takes such files as text)\n")
    with pytest.raises(ValueError, match=r"b\.py is of no supported kind; .*; --suffix \.py takes it as text"):
        tokenize_corpus([folder / "b.py"], tmp_path / "out", model, workers=1)
    assert file_kind(Path("a.py.gz"), [".py"]) == "text"
    assert file_kind(Path("a.jsonl"), [".py"]) == "json"


def test_suffixes_as_they_are_given() -> None:
    assert [text_suffix(text) for text in ("py", ".py", ".PY")] == [".py"] * 3
    for text in ("", ".", "*.py", "a/b", ".tar.gz", ".jsonl", "parquet", ".gz"):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            text_suffix(text)


def test_the_command_splits_and_takes_suffixes(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    for i in range(40):
        (tmp_path / "src" / f"{i}.py").write_text(SENTENCE.format(i))
    words = [tmp_path / "src", "--suffix", "py", "--split", "3,1", "--tokenizer", model, "--output", tmp_path / "out"]
    assert cli.exit_status(lambda: cli.run(["tokenize", "--workers", "1", *map(str, words)])) == 0
    train, held_out = (check_prefix(str(tmp_path / name)).documents for name in ("out", "out_validation"))
    assert train + held_out == 40
    assert f"{tmp_path / 'out_validation'}: {held_out} documents" in capsys.readouterr().out
    for wrong in (["--split", "1"], ["--suffix", "*.py"]):
        arguments = ["tokenize", *map(str, words), *wrong]
        assert cli.exit_status(partial(cli.run, arguments)) == 2
        assert f"argument {wrong[0]}: {wrong[1]!r}" in capsys.readouterr().err
