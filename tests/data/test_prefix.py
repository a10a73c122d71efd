"""Damaged, missing and mismatched corpora; blends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_m1.data.corpora.blend import check_blend, parse_blend, repeated_corpora, shared_corpora
from megatron_m1.data.corpora.prefix import check_prefix, fingerprint, is_sidecar
from tests.data.corpora import unique_documents, write_corpus


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.v1", unique_documents([5, 1, 9]))


def test_summary(prefix: str) -> None:
    summary = check_prefix(prefix)
    assert (summary.documents, summary.tokens, summary.dtype) == (3, 15, np.uint16)
    assert (summary.tokenizer_digest, summary.vocab_size) == (None, None)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: str, suffix: str) -> None:
    os.remove(prefix + suffix)
    with pytest.raises(FileNotFoundError, match=rf"corpus\.v1\{suffix} does not exist; make it"):
        check_prefix(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_pipes_and_devices_are_not_read(prefix: str, tmp_path: Path, suffix: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path = Path(prefix + suffix)
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(
            (ValueError, FileNotFoundError), match=rf"corpus\.v1\{suffix} (does not exist|can't be read)"
        ):
            check_prefix(prefix)
        assert not is_sidecar(path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_any_truncation(prefix: str, suffix: str) -> None:
    size = os.path.getsize(prefix + suffix)
    for kept in range(size):
        os.truncate(prefix + suffix, kept)
        with pytest.raises(ValueError, match=rf"corpus\.v1\{suffix} .*; tokenise"):
            check_prefix(prefix)
        os.truncate(prefix + suffix, 0)
        write_corpus(Path(prefix), unique_documents([5, 1, 9]))
    check_prefix(prefix)


def test_files_of_two_corpora(prefix: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", unique_documents([5, 1, 8]))
    shutil.copy(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(ValueError, match=r"corpus\.v1\.bin has 30 bytes but its index says 28"):
        check_prefix(prefix)


def test_files_of_another_kind(prefix: str) -> None:
    Path(f"{prefix}.idx").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match="is no Megatron index"):
        check_prefix(prefix)


def test_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokens"):
        check_prefix(write_corpus(tmp_path / "c", []))


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Then packs would be cut between sentences, and nothing would tell."""
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for sentence in ([1, 2], [3, 4, 5]):
        builder.add_item(torch.tensor(sentence))
    builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    with pytest.raises(ValueError, match="2 sequences in 1 document;"):
        check_prefix(str(tmp_path / "c"))


def test_sidecar(prefix: str) -> None:
    facts = {"documents": 3, "tokens": 15, "tokenizer_digest": "ab" * 32, "vocab_size": 70}
    Path(f"{prefix}.json").write_text(json.dumps(facts))
    summary = check_prefix(prefix, tokenizer_digest="ab" * 32)
    assert summary.vocab_size == 70
    with pytest.raises(ValueError, match="was tokenised with another tokenizer"):
        check_prefix(prefix, tokenizer_digest="cd" * 32)
    Path(f"{prefix}.json").write_text(json.dumps(facts | {"tokens": 16}))
    with pytest.raises(ValueError, match="tells of 3 documents and 16 tokens"):
        check_prefix(prefix)


SIDECAR = {
    "tokenizer_digest": "ab" * 32,
    "vocab_size": 70,
    "eod": 1,
    "documents": 3,
    "tokens": 15,
    "text_bytes": 40,
    "skipped": {},
}
WHOLE = json.dumps(SIDECAR, indent=1)


@pytest.mark.parametrize(
    "broken",
    [
        *(WHOLE[:length] for length in (0, 1, 2, 9, 20, 60, 120, len(WHOLE) - 1)),
        "\0" * len(WHOLE),
        WHOLE[:40] + "\0" * 60,
        WHOLE.replace("tokenizer_digest", "tokenizer_digesu"),
        WHOLE.replace('"ab', '"ab\x01'),
        '{"tokenizer_digest": "ab"}',
        *(json.dumps(SIDECAR | {key: value}) for key, value in [("tokenizer_digest", 3), ("tokens", "15")]),
        *(
            json.dumps(SIDECAR | {key: value})
            for key, value in [("documents", None), ("vocab_size", 7.5), ("vocab_size", 0)]
        ),
    ],
)
def test_a_damaged_sidecar_is_refused(prefix: str, broken: str) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(WHOLE)
    assert is_sidecar(path)
    path.write_text(broken)
    assert not is_sidecar(path)
    with pytest.raises(ValueError, match=r"is a damaged sidecar .*; tokenise the corpus again"):
        check_prefix(prefix)


@pytest.mark.parametrize(
    "documents",
    [
        '{"text": "a"}\n{"text": "b"}\n',
        '{"text": "a"}\n',
        '[{"text": "a"}]',
        '{"text": "' + "a" * (1 << 20) + '"}',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}\n',
        '{"text": "\\"tokenizer_digest\\""}\n{"text": "b", "tokens": 3, "documents": 1}\nnonsense',
        "[" * 100_000,
        "caf\udce9",
    ],
    ids=["lines", "one document", "list", "large", "indented", "about sidecars", "deep", "latin"],
)
def test_another_tools_documents_are_no_sidecar(prefix: str, documents: str) -> None:
    """Megatron-LM's preprocess_data leaves train.json, its input, where ours has the sidecar."""
    path = Path(f"{prefix}.json")
    path.write_text(documents, errors="surrogateescape")
    assert not is_sidecar(path)
    assert check_prefix(prefix, tokenizer_digest="cd" * 32).tokenizer_digest is None


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_instead_of_the_prefix(prefix: str, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"name the prefix that both share, .*corpus\.v1$"):
        check_prefix(prefix + suffix)


def test_fingerprint_follows_the_content(prefix: str, tmp_path: Path) -> None:
    copy = write_corpus(tmp_path / "copy", unique_documents([5, 1, 9]))
    same_sizes = write_corpus(tmp_path / "swapped", unique_documents([9, 1, 5]))
    assert fingerprint(prefix) == fingerprint(copy) != fingerprint(same_sizes)


def test_blends(prefix: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", unique_documents([45]))
    assert parse_blend(["3", prefix, "1", other]) == ([prefix, other], [0.75, 0.25])
    assert parse_blend([prefix]) == ([prefix], [1.0])
    assert parse_blend([prefix, other]) == ([prefix, other], [0.25, 0.75])
    assert [summary.tokens for summary in check_blend(["3", prefix, "1", other])] == [15, 45]


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ([], "blend is empty"),
        (["0.5", "a", "b"], "mixes prefixes with and without weight"),
        (["0.5"], "mixes"),
        (["0.5", "a", "0.5"], "mixes"),
        (["a", "0.5"], "mixes"),
        (["0.5", "0.5"], "mixes"),
        (["0", "a", "1", "b"], "not above 0"),
        (["-1", "a"], "not above 0"),
        (["nan", "a"], "not above 0"),
        (["inf", "a"], "not above 0"),
    ],
)
def test_bad_blends(blend: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blend(blend)


def other_spellings(prefix: str, folder: Path) -> list[str]:
    """The same corpus through a link to its folder, links to its files, hard links and a winding path."""
    path = Path(prefix)
    (folder / "linked").symlink_to(path.parent)
    for suffix in (".bin", ".idx"):
        (folder / f"soft{suffix}").symlink_to(f"{prefix}{suffix}")
        os.link(f"{prefix}{suffix}", folder / f"hard{suffix}")
    winding = f"{path.parent}/../{path.parent.name}/./{path.name}"
    return [str(folder / "linked" / path.name), str(folder / "soft"), str(folder / "hard"), winding, prefix]


def test_a_corpus_named_again_is_one(prefix: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", unique_documents([45]))
    names = tmp_path / "names"
    names.mkdir()
    for again in other_spellings(prefix, names):
        assert parse_blend(["2", prefix, "1", other, "1", again]) == ([prefix, other], [0.75, 0.25])
        assert parse_blend([other, prefix, again]) == ([other, prefix], [0.6, 0.4])
        assert repeated_corpora(["2", prefix, "1", other, "1", again]) == [(again, prefix)]
        assert shared_corpora([again], [other, prefix]) == [(again, prefix)]
    assert repeated_corpora([prefix, other]) == []
    assert shared_corpora([prefix], [other]) == []


def test_copies_of_a_corpus(prefix: str, tmp_path: Path) -> None:
    copy = write_corpus(tmp_path / "copy", unique_documents([5, 1, 9]))
    with pytest.raises(ValueError, match="are copies of one corpus"):
        check_blend(["1", prefix, "1", copy])
    assert shared_corpora([copy], [prefix]) == [(copy, prefix)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_copies_of_a_corpus_in_another_dtype(prefix: str, tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    copy = write_corpus(tmp_path / "copy", unique_documents([5, 1, 9]), dtype=dtype)
    with pytest.raises(ValueError, match=r"corpus\.v1 and .*copy are copies of one corpus"):
        check_blend(["1", prefix, "1", copy])
    assert shared_corpora([copy], [prefix]) == [(copy, prefix)]


def test_one_token_file_with_two_indices(prefix: str, tmp_path: Path) -> None:
    """Other bounds of documents make another order of packs, of the same tokens."""
    other = write_corpus(tmp_path / "other", [[2, 3, 4, 5, 1, 1, 8], [9, 10, 11, 12, 13, 14, 15, 1]])
    Path(f"{other}.bin").unlink()
    Path(f"{other}.bin").symlink_to(f"{prefix}.bin")
    assert parse_blend(["1", prefix, "1", other]) == ([prefix, other], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"corpus\.v1 and .*other have the same tokens, which their indices cut"):
        check_blend(["1", prefix, "1", other])
    assert shared_corpora([other], [prefix]) == [(other, prefix)]


def test_equal_ends_make_no_copy(tmp_path: Path) -> None:
    """The fingerprint, which keys the order of the packs, reads both ends only."""
    one, other = ([7] * 200_000 for _ in range(2))
    other[60_000:140_000] = [8] * 80_000
    prefixes = [write_corpus(tmp_path / name, [tokens]) for name, tokens in (("one", one), ("other", other))]
    assert len({fingerprint(prefix) for prefix in prefixes}) == 1
    assert [summary.prefix for summary in check_blend(prefixes)] == prefixes
    assert shared_corpora(prefixes[:1], prefixes[1:]) == []


def test_shares_of_a_blend_without_repetition_are_exact(prefix: str, tmp_path: Path) -> None:
    """The order of a run's packs is kept by them."""
    other = write_corpus(tmp_path / "other", unique_documents([45]))
    third = write_corpus(tmp_path / "third", unique_documents([21]))
    weights = [0.1, 0.7, 0.3]
    blend = [str(item) for pair in zip(weights, [prefix, other, third], strict=True) for item in pair]
    assert parse_blend(blend)[1] == [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("weights", [("1e308", "1e308"), ("1e-320", "1e10")])
def test_weights_without_shares(prefix: str, tmp_path: Path, weights: tuple[str, str]) -> None:
    other = write_corpus(tmp_path / "other", unique_documents([45]))
    with pytest.raises(ValueError, match="weights too large or too far apart"):
        parse_blend([weights[0], prefix, weights[1], other])
