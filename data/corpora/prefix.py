"""Tokenised corpora on disk.

``<prefix>.bin`` holds the token ids, ``<prefix>.idx`` Megatron's index, ``<prefix>.json`` (the sidecar) the tokenizer's
digest and the counts.

The checks here read headers and sizes only, so that a dry run can afford them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_m1.files import regular
from megatron_m1.printing import counted

_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, sequences, documents + 1. Then int32 lengths, int64 offsets, int64 document ends."""
INDEX_HEADER_BYTES = _INDEX_HEADER.size
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_DTYPES: dict[int, type[np.integer[Any]]] = {4: np.int32, 5: np.int64, 8: np.uint16}
_FINGERPRINT_BYTES = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 12
_SIDECAR_BYTES = 1 << 20
"""A sidecar is far smaller; a larger file of that name holds somebody's documents."""
_SIDECAR_KEYS: dict[str, type[object]] = {"tokenizer_digest": str, "documents": int, "tokens": int}
LOSS_MASK_KEY = "loss_mask"
"""Of a sidecar: the name of the file that tells which tokens are learnt, if there is one."""
_SIDECAR_BEGINNING = b'{\n "tokenizer_digest"'


@dataclass(frozen=True)
class PrefixSummary:
    """What the headers of a tokenised corpus say."""

    prefix: str
    documents: int
    tokens: int
    dtype: type[np.integer[Any]]
    tokenizer_digest: str | None
    """Of the tokenizer that made it; None without a sidecar (files made by other Megatron tools)."""
    vocab_size: int | None
    """Of that tokenizer."""


def bin_path(prefix: str) -> Path:
    """The token file of ``prefix``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """The index file of ``prefix``."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str) -> Path:
    """The JSON file of ``prefix`` that names its tokenizer and its counts."""
    return Path(f"{prefix}.json")


def is_sidecar(path: Path) -> bool:
    """Whether ``path`` is the sidecar of a tokenised corpus, not somebody's JSON file; False if it can't be read."""
    try:
        return _sidecar_content(path) is not None
    except (OSError, ValueError):
        return False


def is_split_part(prefix: str) -> bool:
    """Whether ``prefix`` is what ``tokenize --split`` held out of a corpus, or left of it."""
    return _says(prefix, "split")


def is_bucket(prefix: str) -> bool:
    """Whether ``prefix`` is what ``tokenize --length-buckets`` took of a corpus by its length."""
    return _says(prefix, "bucket")


def names_loss_mask(prefix: str) -> bool:
    """Whether the sidecar of ``prefix`` says that there is a loss mask; False if it can't be read."""
    return _says(prefix, LOSS_MASK_KEY)


def _says(prefix: str, key: str) -> bool:
    try:
        return key in (_sidecar_content(sidecar_path(prefix)) or {})
    except (OSError, ValueError):
        return False


def check_prefix(prefix: str, *, tokenizer_digest: str | None = None) -> PrefixSummary:
    """Check that the files of ``prefix`` are there, whole and belong together. Takes milliseconds at any size.

    Args:
        prefix: path of the corpus without ``.bin``.
        tokenizer_digest: if given, a sidecar must name this tokenizer.

    Raises:
        FileNotFoundError: the .bin or the .idx is missing.
        ValueError: a file is truncated or of another kind, they do not fit together, there are no tokens, or the
            corpus was made with another tokenizer.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            named = prefix.removesuffix(".bin").removesuffix(".idx")
            if named != prefix and Path(prefix).is_file():
                raise FileNotFoundError(f"{prefix} is one file of a corpus: name the prefix that both share, {named}")
            raise FileNotFoundError(f"{path} does not exist; make it with megatron-m1 tokenize, or correct the prefix")
    dtype, documents, expected = _read_index(idx_path(prefix))
    size = bin_path(prefix).stat().st_size
    if size != expected:
        raise ValueError(
            f"{bin_path(prefix)} has {size} bytes but its index says {expected}; tokenise the corpus again"
        )
    if size == 0:
        raise ValueError(f"{bin_path(prefix)} holds no tokens; tokenise a corpus that has documents")
    tokens = size // np.dtype(dtype).itemsize
    sidecar = _read_sidecar(prefix, documents, tokens)
    digest, vocab_size = sidecar.get("tokenizer_digest"), sidecar.get("vocab_size")
    if tokenizer_digest is not None and digest is not None and digest != tokenizer_digest:
        raise ValueError(
            f"{prefix} was tokenised with another tokenizer ({digest[:12]}, this one is {tokenizer_digest[:12]});"
            " tokenise it again or name its own tokenizer"
        )
    return PrefixSummary(prefix, documents, tokens, dtype, digest, vocab_size)


def is_index_of_sidecar(prefix: str) -> bool:
    """Whether the index of ``prefix`` has the counts that its sidecar, which must be one, tells of."""
    sidecar = _sidecar_content(sidecar_path(prefix))
    assert sidecar is not None
    try:
        dtype, documents, size = _read_index(idx_path(prefix))
    except ValueError:
        return False
    return (sidecar["documents"], sidecar["tokens"]) == (documents, size // np.dtype(dtype).itemsize)


def _read_index(path: Path) -> tuple[type[np.integer[Any]], int, int]:
    """Token dtype, number of documents and bytes of all tokens, after the checks that the index allows by itself."""
    with path.open("rb") as stream:
        head = stream.read(_INDEX_HEADER.size)
    if len(head) < _INDEX_HEADER.size or not head.startswith(_INDEX_MAGIC):
        raise ValueError(f"{path} is no Megatron index or is truncated; tokenise the corpus again")
    _, version, code, sequences, document_bounds = _INDEX_HEADER.unpack(head)
    if version != 1 or code not in _TOKEN_DTYPES:
        raise ValueError(f"{path} has version {version} and dtype code {code}, not 1 and 4, 5 or 8; tokenise again")
    expected = _INDEX_HEADER.size + 12 * sequences + 8 * document_bounds
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {expected}; tokenise again")
    if sequences != document_bounds - 1:
        raise ValueError(
            f"{path} has {counted(sequences, 'sequence')} in {counted(document_bounds - 1, 'document')}; packing needs "
            "one sequence per document: tokenise again without splitting sentences"
        )
    size = 0
    if sequences:
        with path.open("rb") as stream:
            stream.seek(_INDEX_HEADER.size + 4 * (sequences - 1))
            (last_length,) = struct.unpack("<i", stream.read(4))
            stream.seek(_INDEX_HEADER.size + 4 * sequences + 8 * (sequences - 1))
            (last_offset,) = struct.unpack("<q", stream.read(8))
        size = last_offset + last_length * np.dtype(_TOKEN_DTYPES[code]).itemsize
    return _TOKEN_DTYPES[code], sequences, size


def _read_sidecar(prefix: str, documents: int, tokens: int) -> dict[str, Any]:
    path = sidecar_path(prefix)
    if not path.exists():
        return {}
    try:
        sidecar = _sidecar_content(path)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}; move it") from error
    except ValueError as error:
        raise ValueError(f"{path} is a damaged sidecar ({error}); tokenise the corpus again") from error
    if sidecar is None:
        return {}
    if (sidecar["documents"], sidecar["tokens"]) != (documents, tokens):
        raise ValueError(
            f"{path} tells of {counted(sidecar['documents'], 'document')} and {counted(sidecar['tokens'], 'token')}, "
            f"the index of {documents:,} and {tokens:,}; move it if it is of another corpus, or tokenise the corpus "
            "again"
        )
    return sidecar


def _sidecar_content(path: Path) -> dict[str, Any] | None:
    """Content of a sidecar; None for another tool's file of that name, such as the documents themselves.

    Raises:
        ValueError: it was a sidecar, and is torn or damaged.
    """
    with regular(path).open("rb") as stream:
        content = stream.read(_SIDECAR_BYTES + 1)
    if len(content) > _SIDECAR_BYTES:
        return None
    sidecar = _parsed(content)
    if sidecar is None:
        first, _, rest = content.partition(b"\n")
        is_documents = bool(rest) and _parsed(first) is not None
        if is_documents or not _was_sidecar(content):
            return None
        raise ValueError("no JSON")
    if not isinstance(sidecar, dict) or not (_SIDECAR_KEYS.keys() <= sidecar.keys() or _was_sidecar(content)):
        return None
    for key, kind in [*_SIDECAR_KEYS.items(), ("vocab_size", int)]:
        optional = key not in _SIDECAR_KEYS and sidecar.get(key) is None
        if not optional and type(sidecar.get(key)) is not kind:
            raise ValueError(f"{key} is {str(sidecar.get(key))[:40]!r}")
    if sidecar.get("vocab_size") is not None and sidecar["vocab_size"] < 1:
        raise ValueError(f"vocab_size is {sidecar['vocab_size']}")
    return sidecar


def _parsed(content: bytes) -> object:
    """The JSON value; None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _was_sidecar(content: bytes) -> bool:
    """Whether what is left of a file is of a sidecar: its first key, most of its keys, or no more than a beginning."""
    keys = [f'"{key}"'.encode() in content for key in ("documents", "tokens", "vocab_size", "text_bytes", "skipped")]
    return (
        b'"tokenizer_digest"' in content
        or sum(keys) > len(keys) // 2
        or _SIDECAR_BEGINNING.startswith(content.rstrip(b"\0"))
    )


def fingerprint(prefix: str) -> str:
    """Hash of sizes and both ends of the .bin and .idx: tells a corpus that was made anew from the one before."""
    state = hashlib.sha256()
    for path in (bin_path(prefix), idx_path(prefix)):
        size = path.stat().st_size
        state.update(size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            state.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, size - _FINGERPRINT_BYTES), os.SEEK_SET)
            state.update(stream.read(_FINGERPRINT_BYTES))
    return state.hexdigest()


def sampled_content(prefix: str) -> str:
    """Hash of the fingerprint and of blocks all over both files, which tells apart what has the same ends."""
    state = hashlib.sha256(fingerprint(prefix).encode())
    for path in (bin_path(prefix), idx_path(prefix)):
        size = path.stat().st_size
        with path.open("rb", buffering=0) as stream:
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()


def open_tokens(prefix: str) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int32]]:
    """Map a checked corpus into memory.

    Returns:
        Token ids [tokens] of all documents end to end, and the length of each document [documents].
    """
    summary = check_prefix(prefix)
    tokens: npt.NDArray[np.integer[Any]] = np.memmap(bin_path(prefix), dtype=summary.dtype, mode="r")
    lengths: npt.NDArray[np.int32] = np.memmap(
        idx_path(prefix), dtype=np.int32, mode="r", offset=_INDEX_HEADER.size, shape=(summary.documents,)
    )
    return tokens, lengths
