"""Megatron's ``.bin`` and ``.idx``, and a loss mask where there is one, written as batches come.

megatron-core has a builder for these files; to import it takes 15 seconds and 700 MB, which writing two arrays does not
need. The tests compare the files with that builder's, byte by byte.
"""

from __future__ import annotations

import json
import shutil
import struct
from array import array
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_m1.data.corpora.loss_mask import loss_path
from megatron_m1.data.corpora.prefix import LOSS_MASK_KEY, bin_path, idx_path, sidecar_path
from megatron_m1.data.tokenize.documents import Part, SkipReason
from megatron_m1.data.tokenize.encode import EncodedBatch, token_dtype
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.files import put_in_place, write_atomically

_MAKERS = ("megatron-m1", "tokenizers", "transformers", "sentencepiece")
"""Packages of which a version may decide the ids."""
_DTYPE_CODES = {np.int32: 4, np.uint16: 8}
_COPIED_BYTES = 1 << 20
_MOST_TOKENS = 2**31 - 1
"""Of a document: the index has 32 bits for it."""


class TokenWriter:
    """Gathers encoded batches in a folder of its own, then puts the files in place.

    Args:
        folder: an empty one on the file system of the output.
        tokenizer: the one that encodes.
        append_eod: end documents that come in parts with the tokenizer's end mark; others have theirs.
        masked: batches say what of them is learnt, which goes into a file beside the tokens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, append_eod: bool, masked: bool = False) -> None:
        self.documents = self.tokens = self.learnt = self.text_bytes = 0
        self.skipped: Counter[str] = Counter()
        self._bin, self._idx = folder / "tokens.bin", folder / "tokens.idx"
        self._loss = folder / "tokens.loss" if masked else None
        self._tokenizer = tokenizer
        self._append_eod = append_eod
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._lengths = array("i")
        self._stream: BinaryIO = self._bin.open("w+b")
        self._loss_stream: BinaryIO | None = self._loss.open("wb") if self._loss else None
        self._open: _OpenDocument | None = None

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_streams()

    def _close_streams(self) -> None:
        self._stream.close()
        if self._loss_stream is not None:
            self._loss_stream.close()

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document so far, end marks included [documents]."""
        return np.array(self._lengths, dtype=np.int32)

    def add(self, batch: EncodedBatch, *, owner: TokenWriter | None = None) -> None:
        """Append the documents of a batch, or a part to the document that is open.

        Args:
            batch: after all before it.
            owner: with the last part of a document, the writer that gets the whole of it; None is this one.

        Raises:
            ValueError: a document has more tokens than the index can tell.
        """
        if batch.part is Part.WHOLE:
            self._stream.write(batch.tokens)
            if self._loss_stream is not None:
                assert batch.loss is not None
                self._loss_stream.write(batch.loss)
                self.learnt += int(batch.loss.sum(dtype=np.int64))
            self._lengths.frombytes(batch.lengths.tobytes())
            self._count(len(batch.lengths), batch.tokens.size, batch.text_bytes)
            self.skipped += batch.skipped
            return
        if self._open is None:
            self._open = _OpenDocument(start=self._stream.tell())
        self._open.add(batch)
        self._stream.write(batch.tokens)
        if batch.part is Part.LAST:
            self._end(self._open, owner or self)
            self._open = None

    def _end(self, document: _OpenDocument, owner: TokenWriter) -> None:
        reason = document.reason_to_skip()
        if reason is None and owner is not self:
            self._stream.seek(document.start)
            shutil.copyfileobj(self._stream, owner._stream, _COPIED_BYTES)
        if reason is not None or owner is not self:
            self._stream.seek(document.start)
            self._stream.truncate()
        if reason is not None:
            self.skipped[reason] += 1
            return
        owner._close(document)

    def _close(self, document: _OpenDocument) -> None:
        ends = np.array([self._tokenizer.eod] if self._append_eod else [], dtype=self._dtype)
        self._stream.write(ends)
        if document.tokens + ends.size > _MOST_TOKENS:
            raise ValueError(f"a document has {document.tokens:,} tokens, the index takes {_MOST_TOKENS:,}: split it")
        self._lengths.append(document.tokens + ends.size)
        self._count(1, document.tokens + ends.size, document.text_bytes)

    def _count(self, documents: int, tokens: int, text_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes

    def commit(self, prefix: str, *, described: Mapping[str, object]) -> None:
        """Replace an older output. The .idx makes a corpus of the files: the old one goes first, the new comes last.

        Args:
            prefix: of the output.
            described: what the sidecar says besides: which part of a corpus this is, how its documents were made.
        """
        self._close_streams()
        self._write_index()
        sidecar: dict[str, object] = {
            "tokenizer_digest": self._tokenizer.digest(),
            "vocab_size": self._tokenizer.vocab_size,
            "eod": self._tokenizer.eod if self._append_eod else None,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "skipped": dict(self.skipped),
            "versions": installed_versions(),
        }
        if self._loss is not None:
            sidecar |= {LOSS_MASK_KEY: loss_path(prefix).name, "learnt_tokens": self.learnt}
        idx_path(prefix).unlink(missing_ok=True)
        if self._loss is None:
            # While the old sidecar names it: it is ours no longer once the new one does not.
            loss_path(prefix).unlink(missing_ok=True)
        # By the sidecar the files are known as ours, so that the command may replace them after a kill.
        write_atomically(sidecar_path(prefix), json.dumps({**sidecar, **described}, indent=1).encode())
        if self._loss is not None:
            put_in_place(self._loss, loss_path(prefix))
        put_in_place(self._bin, bin_path(prefix))
        put_in_place(self._idx, idx_path(prefix))

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= np.dtype(self._dtype).itemsize
        with self._idx.open("wb") as stream:
            stream.write(b"MMIDIDX\x00\x00")
            stream.write(struct.pack("<QBQQ", 1, _DTYPE_CODES[self._dtype], lengths.size, lengths.size + 1))
            for values in (lengths, offsets, np.arange(lengths.size + 1, dtype=np.int64)):
                stream.write(values)


class _OpenDocument:
    """A document of which some parts were written."""

    def __init__(self, start: int) -> None:
        self.start = start
        """Where it begins in the token file."""
        self.tokens = self.text_bytes = 0
        self._reasons: Counter[str] = Counter()
        self._is_blank = True

    def add(self, part: EncodedBatch) -> None:
        """Count a part."""
        self.tokens += part.tokens.size
        self.text_bytes += part.text_bytes
        self._reasons += part.skipped
        self._is_blank &= part.is_blank

    def reason_to_skip(self) -> str | None:
        """Why the document is left out, once all parts are known; None if it is kept."""
        if self._reasons:
            return next(iter(self._reasons))
        return SkipReason.EMPTY.value if self._is_blank or not self.tokens else None


def remove_output(prefix: str) -> bool:
    """Remove an earlier output, which must be ours; the sidecar by which it is known goes last. Tell if there was one.

    Args:
        prefix: of the output; ``outputs.check_outputs`` has looked at what is there.
    """
    paths = [path(prefix) for path in (idx_path, bin_path, loss_path, sidecar_path)]
    there = [path for path in paths if path.exists()]
    for path in there:
        path.unlink()
    return bool(there)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide about ids, as far as they are installed; imports none of them."""
    found = {}
    for name in _MAKERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
