"""Tokenizers behind one small protocol: SentencePiece models and Hugging Face tokenizer folders."""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_m1.cores import usable_cores
from megatron_m1.data.tokenizers.cuts import LineCut
from megatron_m1.data.tokenizers.hf_tokenizer import HuggingFaceTokenizer
from megatron_m1.data.tokenizers.token_ids import SentencePieceIds, TokenIds
from megatron_m1.files import regular, write_atomically

_LINE_BYTES = 4192
"""SentencePiece's default of ``max_sentence_length``: it leaves out longer lines."""
_PARTS = re.compile(r"(?s).{1,1000}(?:(?<! )(?= )|\Z)|.{1,1000}")
"""Parts of a line of at most 4,000 bytes, cut before spaces where there are some: there no piece ends in any case."""
_RESERVED = re.compile("[\n\0\u2581\u2585]")
"""Where lines end: SentencePiece leaves out a line with U+2585, and takes U+2581 for a space."""
_MAX_THREADS = 1024
"""SentencePiece refuses more."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """All ids are below it; an embedding needs at least as many rows."""

    @property
    def eod(self) -> int:
        """Id that ends a document."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be assumed when it was loaded, one line each; commands print them once."""

    @property
    def line_cut(self) -> LineCut | None:
        """Where a text may be cut so that its parts, encoded by themselves, give its ids; None if no place is known."""

    @property
    def ids(self) -> TokenIds:
        """What makes ids of texts, which can tell where they are from."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any begin or end mark. Marks that are spelled out in the text are plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, equal to those of :meth:`encode` one by one, and faster than these."""

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``. What is no id of this tokenizer is left out: an embedding may have more rows."""

    def digest(self) -> str:
        """SHA-256 of the files that define it, in hexadecimal."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece ``.model`` file or a Hugging Face tokenizer folder, from local files only.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: it cannot be loaded, or has no id that ends a document.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceTokenizer(path)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist; give a SentencePiece .model file or a folder")
    if path.suffix != ".model":
        raise ValueError(
            f"tokenizer {path} is no .model file; give a SentencePiece .model, or the folder that holds it"
        )
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """A SentencePiece model; its ``</s>`` ends documents.

    Models of :func:`train_sentencepiece` give every string back. Others may not: they may change what they normalise,
    and give U+2581 back as a space, as models did that were trained here before pieces had plain spaces.
    """

    def __init__(self, path: Path) -> None:
        content = regular(path).read_bytes()
        try:
            self._ids = SentencePieceIds(content)
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model or is damaged; train or fetch it again") from error
        self._digest = hashlib.sha256(content).hexdigest()
        if self.eod < 0:
            raise ValueError(f"{path} has no </s> to end documents with; train it with an eos_id")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._ids.size

    @property
    def eod(self) -> int:
        """Id of ``</s>``."""
        return int(self._ids.processor.eos_id())

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: a model file is complete."""
        return ()

    @property
    def ids(self) -> TokenIds:
        """What makes ids of texts."""
        return self._ids

    @property
    def line_cut(self) -> LineCut | None:
        """Where a text may be cut so that its parts, encoded by themselves, give its ids; None if no place is known."""
        return self._ids.line_cut

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return self._ids.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on one core."""
        return self._ids.encode_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; ``</s>`` is left out."""
        return self._ids.decode(ids)

    def digest(self) -> str:
        """SHA-256 of the model file."""
        return self._digest


def check_vocab_size(vocab_size: int) -> None:
    """Raise ``ValueError`` if a SentencePiece model of that size has no room for pieces besides bytes and marks."""
    if vocab_size <= 260:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the marks leave no piece: take more than 260")


def train_sentencepiece(documents: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Train a BPE model with byte fallback and write it to ``path``; it gives every string back exactly.

    Ids: 0 unknown (never used), 1 ``</s>``, 2 the line break, 3 to 258 bytes, then pieces. A tab joins no other
    character in a piece, and U+2581, U+2585 and NUL are always bytes: SentencePiece learns no more of these.

    Args:
        documents: training texts; lines are taken by themselves, long ones in parts that are cut before spaces.
        path: the ``.model`` file, written atomically.
        vocab_size: pieces in all.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes or characters, or too large for the texts.
    """
    check_vocab_size(vocab_size)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for document in documents for line in _training_lines(document)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=min(usable_cores(), _MAX_THREADS),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        fix = "a larger vocab_size" if "required_chars" in reason else "a smaller vocab_size or more text"
        raise ValueError(
            f"SentencePiece cannot train {vocab_size} pieces on these texts; take {fix} ({reason})"
        ) from error
    write_atomically(path, _with_plain_spaces(model.getvalue()))


def _training_lines(document: str) -> Iterator[str]:
    """What SentencePiece is given of a document: no line that it would leave out without a word, and all the text."""
    for line in _RESERVED.split(document):
        if len(line) * 4 <= _LINE_BYTES or len(line.encode()) <= _LINE_BYTES:
            if line:
                yield line
        else:
            yield from _PARTS.findall(line)


def _with_plain_spaces(content: bytes) -> bytes:
    """A trained model that has spaces as such in its pieces.

    SentencePiece trains with spaces written as U+2581, and then takes one that is in a text for a space. Once it leaves
    spaces as they are, U+2581 is a character like others: all other texts keep their ids.
    """
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto.FromString(content)
    model.normalizer_spec.escape_whitespaces = False
    for piece in model.pieces:
        if piece.type == proto.ModelProto.SentencePiece.NORMAL:
            piece.piece = piece.piece.replace("\u2581", " ")
    plain: bytes = model.SerializeToString(deterministic=True)
    return plain
