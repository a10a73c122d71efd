"""A SentencePiece tokenizer from the documents that it shall cut."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megatron_m1.data.tokenize.documents import BadDocumentError, document_text
from megatron_m1.data.tokenize.find import find_files
from megatron_m1.data.tokenize.readers import read_batches
from megatron_m1.data.tokenizers.cuts import LineCut
from megatron_m1.data.tokenizers.load import train_sentencepiece
from megatron_m1.files import check_writable

TRAINING_BYTES = 100_000_000
"""Of the inputs, about, that SentencePiece sees: more costs memory and hardly changes the pieces."""


def check_new_model(path: Path) -> None:
    """Check where a trained tokenizer shall be written.

    Raises:
        ValueError: it is there already, is no ``.model``, or can't be written.
    """
    if path.suffix != ".model":
        raise ValueError(f"a trained tokenizer is one file: {path} must end in .model")
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already: leave --train-tokenizer out to use it, or choose another name")
    check_writable(f"the tokenizer {path}", path.parent)


def train_tokenizer(
    inputs: Sequence[str | Path],
    path: Path,
    *,
    vocab_size: int,
    text_key: str = "text",
    text_suffixes: Collection[str] = (),
) -> None:
    """Train a BPE model with byte fallback on documents, evenly thinned where there is much, and write it atomically.

    Args:
        inputs: files, folders or globs, see ``find.find_inputs``.
        path: the ``.model`` file to write; its folder is made.
        vocab_size: pieces in all.
        text_key: key of a JSON object, or Parquet column, that holds the text.
        text_suffixes: of files that are text besides the usual ones, from ``find.text_suffix``.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: ``path`` is there already or is no ``.model``, an input can't be read, or ``vocab_size`` does not
            suit the texts.
    """
    check_new_model(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = _sample(find_files(inputs, text_suffixes), text_key, text_suffixes)
    train_sentencepiece(texts, path, vocab_size=vocab_size)


def _sample(files: Sequence[Path], text_key: str, text_suffixes: Collection[str]) -> Iterator[str]:
    step = 1 + sum(file.stat().st_size for file in files) // TRAINING_BYTES
    index = -1
    # To train, lines are taken by themselves in any case.
    anywhere = LineCut(before=None, after=None)
    for batch in read_batches(files, text_key=text_key, cut=anywhere, text_suffixes=text_suffixes):
        for payload in batch.payloads:
            index += 1
            if index % step:  # never the first: there may be few documents, all of them large
                continue
            try:
                yield document_text(batch.kind, payload, text_key=text_key)
            except BadDocumentError:
                continue  # counted and named when the corpus is tokenised
