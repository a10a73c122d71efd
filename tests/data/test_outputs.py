"""``tokenize`` writes over nothing that it reads, and over nothing that it did not make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_m1.cli import run
from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.data.tokenizers import train_sentencepiece
from tests.data.corpora import unique_documents, write_corpus

DOCUMENTS = "".join(json.dumps({"text": f"document {i} of the corpus"}) + "\n" for i in range(9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model."""
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_sentencepiece([DOCUMENTS], path, vocab_size=300)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def named_like_the_sidecar(folder: Path) -> str:
    (folder / "web.json").write_text(DOCUMENTS)
    return "web.json"


def linked_to_the_sidecar(folder: Path) -> str:
    (folder / "web.json").write_text(DOCUMENTS)
    (folder / "soft.jsonl").symlink_to("web.json")
    return "soft.jsonl"


def hard_link_of_the_sidecar(folder: Path) -> str:
    (folder / "web.json").write_text(DOCUMENTS)
    os.link(folder / "web.json", folder / "hard.jsonl")
    return "hard.jsonl"


def sidecar_is_a_link_to_it(folder: Path) -> str:
    (folder / "docs.jsonl").write_text(DOCUMENTS)
    (folder / "web.json").symlink_to("docs.jsonl")
    return "docs.jsonl"


def in_the_working_folder(folder: Path) -> str:
    (folder / "web.partial").mkdir()
    (folder / "web.partial" / "docs.jsonl").write_text(DOCUMENTS)
    return "web.partial/docs.jsonl"


@pytest.mark.parametrize(
    "place",
    [
        named_like_the_sidecar,
        linked_to_the_sidecar,
        hard_link_of_the_sidecar,
        sidecar_is_a_link_to_it,
        in_the_working_folder,
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_an_input_is_not_written_over(tmp_path: Path, model: Path, place: Callable[[Path], str], train: bool) -> None:
    documents = tmp_path / place(tmp_path)
    before = contents(tmp_path)
    tokenizer = ["--tokenizer", str(tmp_path / "new.model"), "--train-tokenizer", "300"] if train else []
    words = ["tokenize", str(documents), "--output", str(tmp_path / "web"), "--workers", "1"]
    with pytest.raises(ValueError, match=r"would be written over, but .* is read: choose another output$"):
        run([*words, *(tokenizer or ["--tokenizer", str(model)])])
    assert contents(tmp_path) == before


def test_a_tokenizer_is_not_written_over(tmp_path: Path, model: Path) -> None:
    """The sidecar of ``hf/tokenizer`` would be the folder's tokenizer.json."""
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    folder = tmp_path / "hf"
    folder.mkdir()
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "document", "of", "the", "corpus"])}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<unk>"})
    )
    before = contents(tmp_path)
    words = ["tokenize", str(tmp_path / "docs.jsonl"), "--tokenizer", str(folder), "--workers", "1"]
    with pytest.raises(ValueError, match=r"hf/tokenizer\.json would be written over"):
        run([*words, "--output", str(folder / "tokenizer")])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("names", [["web.json"], ["web.bin"], ["web.idx"], ["web.bin", "web.idx"]])
def test_somebodys_files_are_not_replaced(tmp_path: Path, model: Path, names: list[str]) -> None:
    """A JSON file that is no sidecar; token files of another Megatron tool, which have none."""
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    for name in names:
        (tmp_path / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    words = ["tokenize", str(tmp_path / "docs.jsonl"), "--tokenizer", str(model), "--workers", "1"]
    with pytest.raises(ValueError, match=rf"{names[0]} is there, and not by megatron-m1 tokenize .*: move it, or choo"):
        run([*words, "--output", str(tmp_path / "web")])
    assert contents(tmp_path) == before


def test_another_tools_corpus_is_not_replaced_for_an_old_sidecar(tmp_path: Path, model: Path) -> None:
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    words = ["tokenize", str(tmp_path / "docs.jsonl"), "--tokenizer", str(model), "--workers", "1"]
    words += ["--output", str(tmp_path / "web")]
    assert run(words) == 0
    write_corpus(tmp_path / "web", unique_documents([5, 7]))
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"web\.idx is there, and .*web\.json tells of another corpus .*: move them, or"
    ):
        run(words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["web.partial/thesis.txt", "web.lock"])
def test_somebodys_files_in_the_way_of_the_work_are_not_removed(tmp_path: Path, model: Path, name: str) -> None:
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    words = ["tokenize", str(tmp_path / "docs.jsonl"), "--tokenizer", str(model), "--workers", "1"]
    with pytest.raises(ValueError, match=r"web\.(partial|lock) is there, and n.* megatron-m1.*: move it, or choose "):
        run([*words, "--output", str(tmp_path / "web")])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["sub/", "sub/.", "sub/..", ".", "new/", ""])
def test_an_output_without_a_name_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Its files would be called ``.bin`` or ``...bin``, which no listing shows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    (tmp_path / "sub").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"ends in no name|--output: the path is empty"):
        run(["tokenize", "docs.jsonl", "--tokenizer", str(model), "--output", output, "--workers", "1"])
    with pytest.raises(ValueError, match=r"must end in \.model|--tokenizer: the path is empty"):
        run(["tokenize", "docs.jsonl", "--tokenizer", output, "--train-tokenizer", "300", "--output", "web"])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_output_is_replaced_whatever_a_kill_left_of_it(tmp_path: Path, model: Path) -> None:
    (tmp_path / "docs.jsonl").write_text(DOCUMENTS)
    words = ["tokenize", str(tmp_path / "docs.jsonl"), "--tokenizer", str(model), "--workers", "1"]
    words += ["--output", str(tmp_path / "web")]
    assert run(words) == 0
    whole = contents(tmp_path)
    for missing in ([], ["web.idx"], ["web.idx", "web.bin"]):
        for name in missing:
            (tmp_path / name).unlink()
        assert run(words) == 0
        assert contents(tmp_path) == whole
    check_prefix(str(tmp_path / "web"))
