"""Every kind of input file, good and bad."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_m1.data.tokenize.documents import BadDocumentError, Part, document_text
from megatron_m1.data.tokenize.find import find_files, find_inputs
from megatron_m1.data.tokenize.memory import check_text_files
from megatron_m1.data.tokenize.readers import read_batches
from megatron_m1.data.tokenizers.cuts import LineCut

TEXTS = ["plain", "two\nlines\n", "naïve 🙂 \u2028 text", "  spaces  ", "x" * 3_000_000, "\ttab\r\n", "end"]


def read(inputs: list[str | Path], text_key: str = "text") -> tuple[list[str], list[str]]:
    """Texts and reasons for skipping, in order."""
    texts, reasons = [], []
    for batch in read_batches(find_files(inputs), text_key=text_key):
        for payload in batch.payloads:
            try:
                texts.append(document_text(batch.kind, payload, text_key=text_key))
            except BadDocumentError as bad:
                reasons.append(str(bad))
    return texts, reasons


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def test_json_lines_plain_and_compressed(tmp_path: Path) -> None:
    content = jsonl(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    frames = zstandard.ZstdCompressor()
    (tmp_path / "c.json.zst").write_bytes(frames.compress(content[:77]) + frames.compress(content[77:]))
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.zst"):
        assert read([tmp_path / name]) == (TEXTS, []), name
    assert read([tmp_path]) == (TEXTS * 3, [])


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n  \n"])
def test_line_endings_and_byte_order_mark(tmp_path: Path, ending: bytes) -> None:
    lines = [b'\xef\xbb\xbf{"text": "a"}', b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes((ending or b"\n").join(lines) + ending)
    assert read([tmp_path / "a.jsonl"]) == (["a", "b"], [])


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\nfile")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("dritte é".encode()))
    (tmp_path / "d.txt").write_bytes(b"latin \xe9")
    (tmp_path / "e.txt").write_bytes(b" \n")
    assert read([tmp_path]) == (["first", "second\n\nfile", "dritte é"], ["bad UTF-8", "empty"])


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "body": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    large = pa.table({"body": pa.array(TEXTS, pa.large_string())})
    pq.write_table(large, tmp_path / "b.parquet")
    repeated = pa.table({"body": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(repeated, tmp_path / "c.parquet")
    assert read([tmp_path], "body") == (TEXTS * 3, [])
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text': .*--text-key, from .*\bid\b"):
        read([tmp_path / "a.parquet"], "text")
    twice = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["body", "body"])
    pq.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet has several columns called 'body': rename"):
        read([tmp_path / "d.parquet"], "body")
    assert read([tmp_path / "a.parquet"], "id") == ([], ["not a string"] * len(TEXTS))


def test_bad_parquet_values(tmp_path: Path) -> None:
    no_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    column = pa.concat_arrays([pa.array(["good", None, " "]), no_utf8, pa.array(["also"])])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read([tmp_path]) == (["good", "also"], ["not a string", "empty", "bad UTF-8"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not a JSON object"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"text": "x", "n": ' + b"[" * 100_000, "not a JSON object"),
        (b'{"text": "x", "n": ' + b"[" * 100_000 + b"1,]" + b"]" * 99_999 + b"}", "not a JSON object"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"x}", "not a JSON object"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not a string"),
        (b'{"n": ' + b"9" * 5000 + b"}", "key missing"),
        (b"{}", "key missing"),
        (b'{"text": 5}', "not a string"),
        (b'{"text": null}', "not a string"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\t "}', "empty"),
        (b'{"text": "\xff"}', "bad UTF-8"),
        (b'{"text": "\\ud800"}', "bad UTF-8"),
    ],
)
def test_bad_lines_are_counted_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["before"]) + line + b"\n" + jsonl(["after"]))
    assert read([tmp_path]) == (["before", "after"], [reason])


@pytest.mark.parametrize(
    "value",
    [
        b"9" * 5000,
        b"-" + b"9" * 5000,
        b"[" + b"7" * 100_000 + b"]",
        b"1e999999",
        b"NaN",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b'"}]\\""' + b"}" * 50_000,
        b'"\\ud800"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"a\tb\x00"',
    ],
    ids=str,
)
def test_fields_that_nobody_asked_for_cost_no_document(tmp_path: Path, value: bytes) -> None:
    lines = [b'{"a": ' + value + b', "text": "kept"}', b'{"text": "kept", "a": ' + value + b"}"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert read([tmp_path]) == (["kept", "kept"], [])


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.string_view(), pa.large_string()], ids=str
)
def test_parquet_text_stored_as_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([text.encode() for text in TEXTS], pa.binary()).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", store_schema=True)
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet", store_schema=False)
    if kind in (pa.binary(), pa.large_binary()):
        pq.write_table(pa.table({"text": column.dictionary_encode()}), tmp_path / "c.parquet")
    assert read([tmp_path]) == (TEXTS * len(list(tmp_path.iterdir())), [])


def test_parquet_bytes_of_fixed_size_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    fixed = pa.array([b"abc", "né".encode(), None, b"\xff\xfea", b"   "], pa.binary(3))
    pq.write_table(pa.table({"text": fixed}), tmp_path / "a.parquet")
    assert read([tmp_path]) == (["abc", "né"], ["not a string", "bad UTF-8", "empty"])


def test_large_documents_come_in_parts_where_a_rule_allows_it(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["before", text, "after"]))
    pq.write_table(pa.table({"text": ["before", text, "after"]}), tmp_path / "c.parquet")
    cut = LineCut(before=None, after=frozenset(b"l"))
    for name, around in (("a.txt", 0), ("b.jsonl", 1), ("c.parquet", 1)):
        batches = list(read_batches([tmp_path / name], text_key="text", cut=cut))
        parts = [batch for batch in batches if batch.part is not Part.WHOLE]
        assert [part.part for part in parts] == [Part.FIRST, *[Part.MIDDLE] * (len(parts) - 2), Part.LAST]
        contents = [document_text("text", payload, text_key="") for part in parts for payload in part.payloads]
        assert "".join(contents) == text
        assert len(parts) > 3
        assert max(part.size for part in parts) < 1_000_000
        assert len(batches) - len(parts) >= 2 * around or around == 0
        assert sum(batch.file_bytes for batch in batches) == (tmp_path / name).stat().st_size


def test_a_document_that_is_too_large_for_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    """A sparse file: nothing of it can have been read before."""
    path = tmp_path / "large.txt"
    path.touch()
    os.truncate(path, 1 << 43)
    with pytest.raises(ValueError, match=r"large\.txt has a document of 8,796,093 MB .*split it"):
        check_text_files([path])


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x" * 1000] * 2000))
    batches = read_batches([path], text_key="text")
    next(batches)
    with path.open("ab") as stream:
        stream.write(jsonl(["more"]))
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read"):
        list(batches)


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("a.jsonl", "deep/b.txt"):
        (folder / name).write_text('{"text": "x"}\n')
    for name in ("a.py", "deep/b.py", "deep/c.PY", "Makefile", ".cache/c.jsonl", ".hidden.jsonl", "d.bin", "d.idx"):
        (folder / name).write_text("x")
    (folder / "d.json").write_text(json.dumps({"tokenizer_digest": "0", "documents": 1, "tokens": 1}))
    # Another tool's corpus beside its documents.
    for name in ("train.bin", "train.idx"):
        (folder / name).write_text("x")
    (folder / "train.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    found = find_inputs([folder])
    assert [file.name for file in found.files] == ["a.jsonl", "b.txt", "train.json"]
    (passed,) = found.passed_over
    assert dict(passed.counts) == {
        ".py": 3,
        "without suffix": 1,
        "hidden": 3,
        ".bin": 2,
        ".idx": 2,
        "sidecar": 1,
        "broken link": 1,
    }
    line = str(passed)
    assert line.startswith(f"passed over in {folder}: 3 ")
    assert "\n" not in line
    for words in ("3 .py", "3 hidden", f"1 sidecar ({folder / 'd.json'})", f"1 broken link ({folder / 'gone.txt'})"):
        assert words in line


def test_a_file_with_several_names_comes_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["once"]))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_inputs([tmp_path])
    assert [file.name for file in found.files] == ["a.jsonl"]
    assert dict(found.passed_over[0].counts) == {"met before": 3}


def test_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"], key="content") + jsonl(["y"]))
    assert read([tmp_path], "content") == (["x"], ["key missing"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_files_are_named(tmp_path: Path, name: str, kept: float) -> None:
    content = jsonl([str(i) * 50 for i in range(3000)])
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["a", "b"] * 500}), path)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else zstandard.compress(content))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
        read([path])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(jsonl(["plain"]))
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
        read([tmp_path])


def test_folders_globs_and_order(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl", ".hidden.jsonl", "image.png", "tokens.idx"):
        (tmp_path / name).write_bytes(jsonl([name]))
    # The sidecar of a tokenised corpus is no input.
    (tmp_path / "tokens.json").write_text('{"text": "no", "tokenizer_digest": "0", "documents": 1, "tokens": 2}')
    assert read([tmp_path])[0] == ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]
    assert read([f"{tmp_path}/*.jsonl"])[0] == ["a.jsonl", "b.jsonl"]
    assert read([f"{tmp_path}/**/[cd].jsonl"])[0] == ["sub/c.jsonl", "sub/deep/d.jsonl"]
    assert read([tmp_path / "b.jsonl", tmp_path])[0][:2] == ["b.jsonl", "a.jsonl"]
    assert len(find_files([tmp_path, tmp_path / "a.jsonl"])) == 4


def test_wrong_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        find_files([tmp_path / "nothing.jsonl"])
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        find_files([f"{tmp_path}/*.jsonl"])
    with pytest.raises(ValueError, match=r"a\.pdf is of no supported kind"):
        find_files([tmp_path / "a.pdf"])
    with pytest.raises(ValueError, match="holds no document files"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="no input"):
        find_files([])
