"""Tokenising whole corpora: content, order, counts, and what a kill or a failure leaves behind."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_m1.data.corpora.prefix import check_prefix, open_tokens
from megatron_m1.data.tokenize import tokenize_corpus
from megatron_m1.data.tokenize.encode import EncodedBatch, token_dtype
from megatron_m1.data.tokenize.token_files import TokenWriter
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_m1.data.tokenizers.cuts import LineCut
from megatron_m1.data.tokenizers.token_ids import PlacedIds, TokenIds
from megatron_m1.data.tokenizers.train import train_tokenizer
from megatron_m1.files import file_lock
from tests.data.test_tokenizers import hugging_face_folder

SENTENCE = "The quick brown fox jumps over the lazy dog number {}.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([SENTENCE.format(i) for i in range(100)], path, vocab_size=300)
    return path


def texts(count: int) -> list[str]:
    return ["".join(SENTENCE.format(i * j) for j in range(1 + i % 7)) for i in range(count)]


def jsonl(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": document}).encode() + b"\n" for document in documents)


def files_of(prefix: str) -> dict[str, bytes]:
    return {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")}


def test_documents_report_and_sidecar(tmp_path: Path, model: Path) -> None:
    documents = texts(40)
    bad = b'{"text": 1}\n{"txt": "x"}\n{"text": "  "}\nnonsense\n{"text": "\xff"}\n{"text": ""}\n'
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:30]) + bad)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(documents[30:])))
    report = tokenize_corpus([tmp_path], tmp_path / "out" / "all", model, workers=1)

    tokenizer = load_tokenizer(model)
    dataset = IndexedDataset(str(tmp_path / "out" / "all"))
    assert [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))] == documents
    assert all(dataset[i][-1] == tokenizer.eod and tokenizer.eod not in dataset[i][:-1] for i in range(len(dataset)))
    assert dataset.document_indices.tolist() == list(range(41))

    expected_tokens = sum(len(tokenizer.encode(document)) + 1 for document in documents)
    expected_bytes = sum(len(document.encode()) for document in documents)
    assert (report.documents, report.tokens, report.text_bytes) == (40, expected_tokens, expected_bytes)
    assert report.bytes_per_token == expected_bytes / expected_tokens
    assert report.skipped == {
        "not a string": 1,
        "key missing": 1,
        "empty": 2,
        "not a JSON object": 1,
        "bad UTF-8": 1,
    }
    assert "40 documents" in str(report)
    assert "2 empty" in str(report)

    summary = check_prefix(str(tmp_path / "out" / "all"), tokenizer_digest=tokenizer.digest())
    assert (summary.documents, summary.tokens, summary.vocab_size) == (40, expected_tokens, 300)
    ids, lengths = open_tokens(str(tmp_path / "out" / "all"))
    assert ids.size == expected_tokens
    assert lengths.tolist() == [len(dataset[i]) for i in range(40)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.bin", "all.idx", "all.json"]


def test_without_end_marks(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    report = tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", model, workers=1, append_eod=False)
    ids, _ = open_tokens(str(tmp_path / "out"))
    assert ids.tolist() == load_tokenizer(model).encode("one document")
    assert report.documents == 1


def test_hugging_face_folder(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "hf")
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(3)))
    tokenize_corpus([tmp_path / "a.jsonl"], tmp_path / "out", folder, workers=1)
    tokenizer, dataset = load_tokenizer(folder), IndexedDataset(str(tmp_path / "out"))
    assert [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(3)] == texts(3)
    assert dataset[0][-1] == tokenizer.eod == 256


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, model: Path) -> None:
    """Several batches a file, so that results arrive out of order."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(texts(2500)) + b"broken\n")
    outputs = []
    for workers in (1, 3):
        report = tokenize_corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", model, workers=workers)
        assert report.skipped == {"not a JSON object": 2}
        outputs.append(files_of(str(tmp_path / "out")))
    assert outputs[0] == outputs[1]


def test_a_failure_keeps_the_old_output(tmp_path: Path, model: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(jsonl(texts(5)))
    prefix = str(tmp_path / "out")
    tokenize_corpus([tmp_path / "good.jsonl"], prefix, model, workers=1)
    before = files_of(prefix)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(texts(2000)))[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz is truncated"):
        tokenize_corpus([tmp_path / "good.jsonl", tmp_path / "cut.jsonl.gz"], prefix, model, workers=1)
    (tmp_path / "empty.jsonl").write_bytes(b'{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no document that can be used \(skipped: 1 empty\)"):
        tokenize_corpus([tmp_path / "empty.jsonl"], prefix, model, workers=1)
    assert files_of(prefix) == before
    assert {path.name for path in tmp_path.glob("out*")} == {"out.bin", "out.idx", "out.json"}


@pytest.mark.usefixtures("workers")
def test_a_kill_keeps_the_old_output_and_the_next_run_cleans_up(tmp_path: Path, model: Path) -> None:
    """The input is a pipe: once it took all we wrote, the run is in the middle of writing.

    ``workers`` decides what its fork server has imported; a fork of this process, which has threads, could hang.
    """
    (tmp_path / "good.jsonl").write_bytes(jsonl(texts(5)))
    prefix = str(tmp_path / "out")
    tokenize_corpus([tmp_path / "good.jsonl"], prefix, model, workers=1)
    before = files_of(prefix)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    victim = multiprocessing.get_context("forkserver").Process(
        target=tokenize_corpus, args=([pipe], prefix, model), kwargs={"workers": 1}
    )
    victim.start()
    with pipe.open("wb") as stream:
        stream.write(jsonl(texts(20_000)))
        stream.flush()
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    assert (tmp_path / "out.partial" / "tokens.bin").stat().st_size > 0
    assert files_of(prefix) == before
    tokenize_corpus([tmp_path / "good.jsonl"], prefix, model, workers=1)
    assert files_of(prefix) == before
    assert {path.name for path in tmp_path.glob("out*")} == {"out.bin", "out.idx", "out.json"}


def feed(pipe: Path, act: Callable[[], None]) -> threading.Thread:
    """Write documents into ``pipe`` from a thread, and call ``act`` when the reader has taken the first of them."""

    def write() -> None:
        try:
            with pipe.open("wb") as stream:
                act()
                while True:
                    stream.write(jsonl(texts(1000)))
        except BrokenPipeError:
            pass  # the reader gave up, as it should

    os.mkfifo(pipe)
    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_an_exception_in_a_worker_is_one_clear_error(tmp_path: Path, model: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(model.read_bytes())
    # Opening the pipe meets the main process after it has loaded the tokenizer, and before any worker exists.
    thread = feed(tmp_path / "pipe.jsonl", tokenizer.unlink)
    with pytest.raises(RuntimeError, match=r"tokenising .*pipe\.jsonl failed: FileNotFoundError"):
        tokenize_corpus([tmp_path / "pipe.jsonl"], tmp_path / "out", tokenizer, workers=2)
    thread.join()
    assert not list(tmp_path.glob("out*"))


def test_a_killed_worker_is_one_clear_error(tmp_path: Path, model: Path) -> None:
    def kill_worker() -> None:
        def run() -> None:
            while not (found := [child for child in psutil.Process().children() if child not in before]):
                pass
            found[-1].kill()

        before = psutil.Process().children()
        threading.Thread(target=run).start()

    thread = feed(tmp_path / "pipe.jsonl", kill_worker)
    with pytest.raises(RuntimeError, match="a tokenising process was killed"):
        tokenize_corpus([tmp_path / "pipe.jsonl"], tmp_path / "out", model, workers=2)
    thread.join()
    assert not list(tmp_path.glob("out*"))


def test_two_writers_of_one_prefix(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with (
        file_lock(tmp_path / "out.lock"),
        pytest.raises(ValueError, match=r"another process is writing .*out; wait for it"),
    ):
        tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", model, workers=1)
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", model, workers=1)


def test_wrong_number_of_workers(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        tokenize_corpus([tmp_path], tmp_path / "out", model, workers=0)


def test_a_tokenizer_trained_on_the_inputs_cuts_them(tmp_path: Path) -> None:
    text = "".join(f"the {word} of every {word}ing\n" for word in ("ring", "state", "mesh", "pack", "head") * 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}) + "\nnot json\n")
    path = tmp_path / "new" / "own.model"
    train_tokenizer([tmp_path / "a.jsonl"], path, vocab_size=280, text_key="body")
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 280
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
    with pytest.raises(ValueError, match=r"own\.model is there already"):
        train_tokenizer([tmp_path / "a.jsonl"], path, vocab_size=280)
    with pytest.raises(ValueError, match=r"must end in \.model"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "folder", vocab_size=280)


def source_text(lines: int) -> str:
    return "".join(f"def function_{i}(argument):\n    return {i} * argument  # naïve\n\n" for i in range(lines))


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
@pytest.mark.parametrize("workers", [1, 2])
def test_large_documents_get_the_ids_of_the_whole(tmp_path: Path, model: Path, kind: str, workers: int) -> None:
    """As one text file, one JSON line and one row, between small ones; the order stays."""
    path = model if kind == "sentencepiece" else hugging_face_folder(tmp_path / "hf")
    tokenizer = load_tokenizer(path)
    assert tokenizer.line_cut is not None
    large = source_text(25_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["before", large, *texts(300)]))
    (tmp_path / "b.txt").write_text(large)
    (tmp_path / "c.jsonl").write_bytes(jsonl(["after"]))
    report = tokenize_corpus(
        [tmp_path / name for name in ("a.jsonl", "b.txt", "c.jsonl")], tmp_path / "out", path, workers=workers
    )
    documents = ["before", large, *texts(300), large, "after"]
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset) == len(documents) == report.documents
    assert report.text_bytes == sum(len(document.encode()) for document in documents)
    encoded = {text: [*tokenizer.encode(text), tokenizer.eod] for text in documents}
    for number, text in enumerate(documents):
        assert dataset[number].tolist() == encoded[text]


def test_large_documents_that_are_no_text_cost_nothing_else(tmp_path: Path, model: Path) -> None:
    large = source_text(25_000).encode()
    (tmp_path / "a.txt").write_bytes(large[:1_000_000] + b"\xff" + large[1_000_000:])
    (tmp_path / "b.txt").write_bytes(b" \n" * 1_000_000)
    (tmp_path / "c.txt").write_text("good")
    report = tokenize_corpus([tmp_path / f"{name}.txt" for name in "abc"], tmp_path / "out", model, workers=2)
    assert report.skipped == {"bad UTF-8": 1, "empty": 1}
    tokens, lengths = open_tokens(str(tmp_path / "out"))
    assert tokens.tolist() == [*load_tokenizer(model).encode("good"), load_tokenizer(model).eod]
    assert lengths.tolist() == [tokens.size]


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_files_are_those_of_megatrons_own_builder(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = NumberedTokenizer(vocab_size)
    documents = [list(range(1 + 7 * i % 400)) for i in range(50)]
    prefix = str(tmp_path / "ours")
    with TokenWriter(tmp_path, tokenizer, append_eod=False) as writer:
        for group in (documents[:1], documents[1:30], [], documents[30:]):
            tokens = np.array([i for ids in group for i in ids], dtype=token_dtype(vocab_size))
            lengths = np.array([len(ids) for ids in group], dtype=np.int32)
            writer.add(EncodedBatch(tokens, lengths, 0, Counter()))
        writer.commit(prefix, described={})
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes(), suffix


@dataclass(frozen=True)
class NumberedTokenizer:
    """Numbers are its text."""

    vocab_size: int
    eod: int = 0
    notes: tuple[str, ...] = ()
    line_cut: LineCut | None = None

    @property
    def ids(self) -> TokenIds:
        return self

    @property
    def size(self) -> int:
        return self.vocab_size

    @property
    def marks(self) -> tuple[str, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_placed(self, text: str, *, with_marks: bool) -> PlacedIds:
        places = [word.span() for word in re.finditer(r"\S+", text)]
        return PlacedIds(np.array(self.encode(text), np.int64), np.array(places, np.int64).reshape(-1, 2))

    def encode_batch(self, many: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in many]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def digest(self) -> str:
        return "0" * 64


def test_the_sidecar_tells_what_made_it(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", model, workers=1)
    found = json.loads((tmp_path / "out.json").read_text())["versions"]
    assert found == {
        "megatron-m1": version("megatron-m1"),
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "sentencepiece": sentencepiece.__version__,
    }


def test_what_is_passed_over_is_said(tmp_path: Path, model: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.py", "c.py", ".d.txt"):
        (tmp_path / "corpus" / name).write_text("text")
    report = tokenize_corpus([tmp_path / "corpus"], tmp_path / "out", model, workers=1)
    first = f"passed over in {tmp_path / 'corpus'}: 2 .py, 1 hidden (--suffix .EXT takes such files as text)"
    assert str(report).splitlines()[0] == first
    assert str(report).splitlines()[1].startswith(f"{tmp_path / 'out'}: 1 document,")


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_tokenising_imports_no_torch(tmp_path: Path, model: Path, kind: str) -> None:
    """Neither does the command, nor a process that it starts, which has these modules when it has encoded a batch."""
    path = model if kind == "sentencepiece" else hugging_face_folder(tmp_path / "hf")
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(3)))
    command = (
        "from megatron_m1.data.tokenize import tokenize_corpus\ntokenize_corpus(['a.jsonl'], 'out', path, workers=1)"
    )
    worker = (
        "from megatron_m1.data.tokenize.encode import Encoder, encode_batch_in_worker\n"
        "from megatron_m1.data.tokenize.documents import RawBatch\n"
        "encode_batch_in_worker(Encoder(Path(path), 'text', True), RawBatch(Path('a'), 'text', [b'some text'], 9))"
    )
    for lines, refused in (
        (command, {"torch", "transformers", "megatron"}),
        (worker, {"torch", "transformers", "megatron", "pyarrow", "rich", "zstandard"}),
    ):
        code = f"import sys\nfrom pathlib import Path\npath = sys.argv[1]\n{lines}\nprint(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code, path], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        loaded = {name.partition(".")[0] for name in done.stdout.split()}
        assert "numpy" in loaded
        assert not loaded & refused
