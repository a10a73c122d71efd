"""Ids and bounds of whole corpora: bad ones are named, and a corpus is read once until it changes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m1.data.corpora.ids import check_token_ids, unread_bytes
from megatron_m1.data.corpora.prefix import fingerprint
from megatron_m1.data.packed import build_packed_dataset
from megatron_m1.runtime.pool import WorkerPool
from tests.data.corpora import FakeTokenizer, unique_documents, write_corpus
from tests.harness.preload import with_bad_sector

HEADER = struct.Struct("<9sQBQQ")
LENGTHS = [5, 1, 9, 3]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus", unique_documents(LENGTHS))


def check(prefix: str, cache: Path, vocab_size: int = 20, *, remember: bool = True) -> None:
    check_token_ids([prefix], vocab_size=vocab_size, cache_folder=cache, remember=remember)


def set_tokens(prefix: str, changes: dict[int, int]) -> None:
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    for place, value in changes.items():
        tokens[place] = value
    tokens.tofile(f"{prefix}.bin")


def write_signed(prefix: Path, tokens: list[int], dtype: type[np.integer]) -> str:
    """One document in one of the wider types, byte by byte."""
    code = {np.int32: 4, np.int64: 5}[dtype]
    np.array(tokens, dtype).tofile(f"{prefix}.bin")
    index = HEADER.pack(b"MMIDIDX\0\0", 1, code, 1, 2) + struct.pack("<iqqq", len(tokens), 0, 0, 1)
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)


def test_ids_of_the_vocabulary(prefix: str, tmp_path: Path) -> None:
    check(prefix, tmp_path / "cache", vocab_size=19)
    with pytest.raises(
        ValueError, match=r"corpus has the id 18 at token 16, in document 3, but the vocab.* has 18 tok"
    ):
        check(prefix, tmp_path / "cache", vocab_size=18)


@pytest.mark.parametrize(("place", "document"), [(0, 0), (4, 0), (5, 1), (6, 2), (14, 2), (15, 3), (17, 3)])
def test_the_place_of_an_id(prefix: str, tmp_path: Path, place: int, document: int) -> None:
    set_tokens(prefix, {place: 40_000})
    with pytest.raises(ValueError, match=rf"has the id 40000 at token {place}, in document {document}, but"):
        check(prefix, tmp_path / "cache")


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_negative_ids(tmp_path: Path, dtype: type[np.integer]) -> None:
    prefix = write_signed(tmp_path / "signed", [3, 7, -2, 5], dtype)
    with pytest.raises(ValueError, match="has the id -2 at token 2, in document 0, but ids are not negative"):
        check(prefix, tmp_path / "cache")


def test_the_first_bad_id_is_named(prefix: str, tmp_path: Path) -> None:
    set_tokens(prefix, {6: 25, 11: 40_000})
    with pytest.raises(ValueError, match="has the id 25 at token 6, in document 2"):
        check(prefix, tmp_path / "cache")
    # What is remembered is of the corpus, not of a vocabulary.
    with pytest.raises(ValueError, match="has the id 40000 at token 11, in document 2"):
        check(prefix, tmp_path / "cache", vocab_size=26)
    check(prefix, tmp_path / "cache", vocab_size=40_001)


def test_an_id_far_within_a_corpus(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "long", [[7] * 300_001, [7] * 300_000])
    set_tokens(prefix, {500_000: 9})
    with pytest.raises(ValueError, match="has the id 9 at token 500,000, in document 1"):
        check(prefix, tmp_path / "cache", vocab_size=9)
    check(prefix, tmp_path / "cache", vocab_size=10)


def test_a_corpus_is_read_once(prefix: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert unread_bytes([prefix], cache) == os.path.getsize(f"{prefix}.bin")
    check(prefix, cache)
    assert unread_bytes([prefix], cache) == 0
    before = Path(f"{prefix}.bin").stat()
    set_tokens(prefix, {7: 99})
    os.utime(f"{prefix}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="has the id 99"):
        check(prefix, cache)


def test_a_change_between_the_ends_is_seen(tmp_path: Path) -> None:
    """The fingerprint of the sample indices' cache reads both ends only."""
    prefix = write_corpus(tmp_path / "long", [[7] * 400_000])
    check(prefix, tmp_path / "cache")
    before = fingerprint(prefix)
    set_tokens(prefix, {200_000: 99})
    assert fingerprint(prefix) == before
    with pytest.raises(ValueError, match="has the id 99"):
        check(prefix, tmp_path / "cache")


def bytes_read_on_rank(rank: int, world_size: int, prefix: str, cache: str) -> int:
    torch.distributed.barrier()
    before = bytes_read()
    check(prefix, Path(cache))
    return bytes_read() - before


def bytes_read() -> int:
    """By this process so far, from files and elsewhere."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_processes_read_a_corpus_once(workers: WorkerPool, tmp_path: Path) -> None:
    """Whoever comes first reads; the others find what it wrote, although all began without."""
    prefix = write_corpus(tmp_path / "long", [[7] * 3_000_000])
    reads = workers.run(bytes_read_on_rank, prefix, str(tmp_path / "cache"), world_size=2)
    whole = os.path.getsize(f"{prefix}.bin")
    assert sorted(read >= whole for read in reads) == [False, True]


def test_a_log_says_what_takes_long(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokens = (1 << 29) + 1
    prefix = tmp_path / "large"
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * tokens)
    Path(f"{prefix}.idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 1, 2) + struct.pack("<iqqq", tokens, 0, 0, 1))
    for _ in range(2):
        check(str(prefix), tmp_path / "cache")
    assert capfd.readouterr().err == f"checking the ids of {prefix} (1.1 GB)\n"


@pytest.mark.parametrize("documents", [[[5]], [[5], [6], [7]], [[], [5], []]])
def test_a_corpus_without_a_token_to_predict(tmp_path: Path, documents: list[list[int]]) -> None:
    prefix = write_corpus(tmp_path / "single", documents)
    with pytest.raises(ValueError, match="has no document of 2 tokens, so there is nothing to predict"):
        check(prefix, tmp_path / "cache")


def test_a_dry_run_leaves_nothing(prefix: str, tmp_path: Path) -> None:
    check(prefix, tmp_path / "cache", remember=False)
    assert not (tmp_path / "cache").exists()


def test_a_torn_record_is_read_anew(prefix: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    check(prefix, cache)
    for record in cache.iterdir():
        record.write_text('{"smallest": 1')
    check(prefix, cache)
    assert unread_bytes([prefix], cache) == 0


@pytest.mark.parametrize(
    ("kind", "entry", "value"),
    [
        ("length", 0, -5),
        ("length", 1, 2),
        ("offset", 0, 4),
        ("offset", 2, 1 << 60),
        ("offset", 1, -8),
        ("bound", 0, 1),
        ("bound", 2, 1 << 40),
        ("bound", 4, 3),
    ],
)
def test_damage_within_an_index(prefix: str, tmp_path: Path, kind: str, entry: int, value: int) -> None:
    documents = len(LENGTHS)
    form, start, size = {
        "length": ("<i", 0, 4),
        "offset": ("<q", 4 * documents, 8),
        "bound": ("<q", 12 * documents, 8),
    }[kind]
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(form, content, HEADER.size + start + size * entry, value)
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus\.idx is damaged at"):
        check(prefix, tmp_path / "cache")


def test_a_dataset_checks_its_corpora(prefix: str, tmp_path: Path) -> None:
    set_tokens(prefix, {3: 77})
    with pytest.raises(ValueError, match="has the id 77 at token 3"):
        build_packed_dataset(
            [prefix], sequence_length=4, num_samples=3, seed=1, tokenizer=FakeTokenizer(60), cache_folder=tmp_path
        )


@pytest.mark.parametrize("byte", [3, 300_001])
def test_a_disk_that_can_not_give_a_byte(tmp_path: Path, byte: int) -> None:
    """One line, where a mapping of the file would end the process."""
    prefix = write_corpus(tmp_path / "long", [[7] * 300_000])
    environment = with_bad_sector(tmp_path, Path(f"{prefix}.bin"), byte)
    code = (
        "import sys; from pathlib import Path; from megatron_m1.data.corpora.ids import check_token_ids\n"
        "try: check_token_ids([sys.argv[1]], vocab_size=20, cache_folder=Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, prefix, str(tmp_path / "cache")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == f"{prefix} can't be read: Input/output error\n"
