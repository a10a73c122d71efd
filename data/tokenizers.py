"""Tokenizers behind one small protocol: SentencePiece models and Hugging Face tokenizer folders."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_m1.data.files import write_atomically
from megatron_m1.data.hf_tokenizer import HuggingFaceTokenizer


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
    """A SentencePiece model; its ``</s>`` ends documents."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no SentencePiece model or is damaged; train or fetch it again") from error
        self._digest = hashlib.sha256(content).hexdigest()
        if self._processor.eos_id() < 0:
            raise ValueError(f"{path} has no </s> to end documents with; train it with an eos_id")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.vocab_size())

    @property
    def eod(self) -> int:
        """Id of ``</s>``."""
        return int(self._processor.eos_id())

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: a model file is complete."""
        return ()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on one core."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; ``</s>`` is left out."""
        return str(self._processor.decode([number for number in ids if number < self.vocab_size]))

    def digest(self) -> str:
        """SHA-256 of the model file."""
        return self._digest


def check_vocab_size(vocab_size: int) -> None:
    """Raise ``ValueError`` if a SentencePiece model of that size has no room for pieces besides bytes and marks."""
    if vocab_size <= 260:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the marks leave no piece: take more than 260")


def train_sentencepiece(documents: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Train a BPE model with byte fallback and write it to ``path``; it gives every text back exactly.

    Ids: 0 unknown (never used), 1 ``</s>``, 2 the line break, 3 to 258 bytes, then pieces.

    Args:
        documents: training texts; lines are taken by themselves.
        path: the ``.model`` file, written atomically.
        vocab_size: pieces in all.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes or too large for the texts.
    """
    check_vocab_size(vocab_size)
    lines = (line for document in documents for line in document.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
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
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot train {vocab_size} pieces on these texts; take a smaller vocab_size or more text"
            f" ({str(error).splitlines()[0]})"
        ) from error
    write_atomically(path, model.getvalue())
