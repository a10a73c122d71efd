"""The embedded corpus of this very installation."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.data.demo.corpus import PreparedCorpus, build_corpus, prepare_corpus
from megatron_m1.data.tokenizers import load_tokenizer

VOCAB_SIZE = 1000
PARTS = [f"{source}.{split}" for source in ("code", "prose") for split in ("train", "validation")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    prepare_corpus(folder, vocab_size=VOCAB_SIZE, workers=1)
    return folder


def documents(folder: Path, part: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: what changes when it is written again."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_what_is_prepared(folder: Path) -> None:
    prepared = prepare_corpus(folder, vocab_size=VOCAB_SIZE)
    tokenised = folder / f"bpe-{VOCAB_SIZE}"
    assert prepared == PreparedCorpus(
        tokenised / "tokenizer.model",
        ["0.7", str(tokenised / "code.train"), "0.3", str(tokenised / "prose.train")],
        ["0.7", str(tokenised / "code.validation"), "0.3", str(tokenised / "prose.validation")],
    )
    digest = load_tokenizer(prepared.tokenizer).digest()
    for part in PARTS:
        summary = check_prefix(str(tokenised / part), tokenizer_digest=digest)
        assert summary.documents == len(documents(folder, part))
        assert summary.vocab_size == VOCAB_SIZE


def test_size_and_length_of_documents(folder: Path) -> None:
    """Millions of tokens for training, and a typical document is a small part of a pack of 512."""
    tokens = {part: check_prefix(str(folder / f"bpe-{VOCAB_SIZE}" / part)).tokens for part in PARTS}
    assert tokens["code.train"] > 1_000_000
    assert tokens["prose.train"] > 100_000
    for source in ("code", "prose"):
        assert 0.02 < tokens[f"{source}.validation"] / tokens[f"{source}.train"] < 0.1
        lengths = sorted(map(len, documents(folder, f"{source}.train")))
        assert lengths[len(lengths) // 2] < 1200


def test_code_is_the_library_verbatim(folder: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    for document in documents(folder, "code.validation"):
        heading, _, body = document.partition("\n\n")
        module = heading.removeprefix("# ").replace(".", "/")
        # The heading of a class's piece ends in the class's name.
        candidates = [module, f"{module}/__init__", os.path.dirname(module), f"{os.path.dirname(module)}/__init__"]
        sources = [(root / f"{name}.py").read_text("utf-8") for name in candidates if (root / f"{name}.py").exists()]
        assert any(body.rstrip() in source for source in sources), heading


def test_nothing_held_out_is_trained_on(folder: Path) -> None:
    """Compared by their words alone: also a licence with another year or wrapping would be found."""

    def words(part: str, document: str) -> str:
        content = document.partition("\n\n")[2] if part.startswith("code") else document
        return " ".join(re.findall("[a-z]+", content.lower()))

    train = [words(part, document) for part in PARTS if "train" in part for document in documents(folder, part)]
    held_out = [words(part, document) for part in PARTS if "validation" in part for document in documents(folder, part)]
    assert not set(train) & set(held_out)
    assert max(Counter(train + held_out).values()) == 1
    # Licences repeat paragraphs, not whole files; each of those is there once.
    everything = "\n".join(text for part in PARTS if "prose" in part for text in documents(folder, part))
    permission = re.findall(r"copies of the Software,?\s+and to permit persons to whom the\s+Software", everything)
    assert len(permission) <= 3


def test_the_same_installation_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    counts = build_corpus(tmp_path)
    for part in PARTS:
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (folder / f"{part}.jsonl").read_bytes()
        assert counts[f"{part}.jsonl"] == len(documents(folder, part))


def test_finished_is_left_alone_and_half_finished_completed(folder: Path) -> None:
    before = stamps(folder)
    prepare_corpus(folder, vocab_size=VOCAB_SIZE)
    assert stamps(folder) == before
    tokenised = folder / f"bpe-{VOCAB_SIZE}"
    damaged = tokenised / "prose.validation.bin"
    content = damaged.read_bytes()
    os.truncate(damaged, len(content) // 2)
    (tokenised / "code.validation.idx").unlink()
    prepare_corpus(folder, vocab_size=VOCAB_SIZE)
    assert damaged.read_bytes() == content
    after = stamps(folder)
    assert after.keys() == before.keys()
    again = {Path(name).name.rpartition(".")[0] for name in before if before[name] != after[name]}
    assert again == {"prose.validation", "code.validation"}


def prepare_and_look(folder: Path, results: multiprocessing.Queue[dict[str, tuple[int, int]]]) -> None:
    prepare_corpus(folder, vocab_size=VOCAB_SIZE)
    results.put(stamps(folder / f"bpe-{VOCAB_SIZE}"))


@pytest.mark.usefixtures("workers")
def test_several_processes_at_once_build_once(folder: Path) -> None:
    """Each looks at the files when its call returns: had a second one built them again, they would differ.

    ``workers`` decides what its fork server has imported; a fork of this process, which has threads, could hang.
    """
    for part in PARTS:
        (folder / f"bpe-{VOCAB_SIZE}" / f"{part}.idx").unlink()
    context = multiprocessing.get_context("forkserver")
    results: multiprocessing.Queue[dict[str, tuple[int, int]]] = context.Queue()
    processes = [context.Process(target=prepare_and_look, args=(folder, results)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    final = stamps(folder / f"bpe-{VOCAB_SIZE}")
    assert seen == [final] * 3
    assert not (folder / "corpus.lock").exists()


def test_wrong_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 64"):
        prepare_corpus(tmp_path, vocab_size=64)


def test_somebodys_files_are_not_built_over(tmp_path: Path) -> None:
    (tmp_path / "code.train.jsonl").write_text("mine")
    with pytest.raises(
        ValueError, match=r"code\.train\.jsonl is there, and not by the embedded corpus: choose another"
    ):
        prepare_corpus(tmp_path, vocab_size=VOCAB_SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["code.train.jsonl"]
    assert (tmp_path / "code.train.jsonl").read_text() == "mine"
