"""Every kind of input file, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_m1.data.documents import BadDocumentError, document_text
from megatron_m1.data.find import find_files
from megatron_m1.data.readers import read_batches

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
        (b'{"n": ' + b"9" * 5000 + b"}", "not a JSON object"),
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
    (tmp_path / "tokens.json").write_text('{"text": "no"}')
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
