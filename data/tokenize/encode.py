"""What a tokenising process does to a batch. Without torch or megatron-core, so that the process starts at once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_m1.data.chat.options import ChatOptions
from megatron_m1.data.tokenize.documents import BadDocumentError, Part, RawBatch, SkipReason, decoded, utf8_size
from megatron_m1.data.tokenize.split import text_mark
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of a batch as ids, in their order; or one part of a document."""

    tokens: npt.NDArray[np.integer[Any]]
    """All ids end to end [tokens]."""
    lengths: npt.NDArray[np.int32]
    """Ids of each document [documents]."""
    text_bytes: int
    """UTF-8 bytes of the documents that were kept."""
    skipped: Counter[str]
    """Documents left out, by reason."""
    part: Part = Part.WHOLE
    is_blank: bool = False
    """Of a part: it holds nothing but white space."""
    marks: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """What tells the text of each document from others, by ``split.text_mark``; of a part, that of its text [1]."""
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """UTF-8 bytes of each of these texts."""
    keys: tuple[str, ...] = ()
    """Of the first record without the text's key: its keys."""
    loss: npt.NDArray[np.uint8] | None = None
    """Of conversations, for each of ``tokens`` [tokens]: 1 where it is learnt, 0 where not."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with the first document that is left out, by the reason, where there is more to say."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was done to documents that are kept, and how often."""


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The dtype of token files that megatron-core takes for a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def encode_batch(tokenizer: Tokenizer, batch: RawBatch, *, text_key: str, append_eod: bool) -> EncodedBatch:
    """Parse and tokenise the documents of a batch; bad ones are counted, not raised.

    A part of a document comes without an end mark, and is only left out if it is no text: what is said of a whole
    document is for the one to say who has all its parts.
    """
    texts: list[str] = []
    skipped: Counter[str] = Counter()
    keys = batch.keys
    is_whole = batch.part is Part.WHOLE
    for payload in batch.payloads:
        try:
            text = decoded(batch.kind, payload, text_key=text_key)
        except BadDocumentError as bad:
            skipped[bad.reason.value] += 1
            keys = keys or bad.keys
            continue
        if is_whole and (not text or text.isspace()):
            skipped[SkipReason.EMPTY.value] += 1
        else:
            texts.append(text)
    documents = tokenizer.encode_batch(texts)
    if is_whole:
        kept = [text for text, ids in zip(texts, documents, strict=True) if ids]
        skipped[SkipReason.EMPTY.value] += len(texts) - len(kept)
        texts, documents = kept, [ids for ids in documents if ids]
    ends = [tokenizer.eod] if append_eod and is_whole else []
    lengths = np.array([len(ids) + len(ends) for ids in documents], dtype=np.int32)
    tokens = np.empty(int(lengths.sum(dtype=np.int64)), dtype=token_dtype(tokenizer.vocab_size))
    start = 0
    for ids in documents:
        tokens[start : start + len(ids)] = ids
        start += len(ids) + len(ends)
        tokens[start - len(ends) : start] = ends
    is_blank = not is_whole and all(not text or text.isspace() for text in texts)
    marks = np.array([text_mark(text) for text in texts], dtype=np.uint64)
    sizes = np.array([utf8_size(text) for text in texts], dtype=np.int64)
    return EncodedBatch(tokens, lengths, int(sizes.sum()), +skipped, batch.part, is_blank, marks, sizes, keys)


@dataclass(frozen=True)
class Encoder:
    """How documents become ids. It is sent to worker processes, so it holds paths and not what is loaded from them."""

    tokenizer_path: Path
    text_key: str
    """Of a JSON object: what holds its text, or the messages of a conversation."""
    append_eod: bool
    """End whole documents with the end mark; conversations end as their template has it."""
    chat: ChatOptions | None = None
    """How conversations become text; None takes documents for text."""

    def opened(self, tokenizer: Tokenizer) -> Callable[[RawBatch], EncodedBatch]:
        """What encodes a batch with ``tokenizer``, that of the path; errors as of ``chat.encode.open_chat``."""
        if self.chat is None:
            return partial(encode_batch, tokenizer, text_key=self.text_key, append_eod=self.append_eod)
        # It imports a part of transformers, which only conversations need.
        from megatron_m1.data.chat.encode import encode_conversations, open_chat

        return partial(encode_conversations, open_chat(tokenizer, self.tokenizer_path, self.chat), key=self.text_key)


def encode_batch_in_worker(encoder: Encoder, batch: RawBatch) -> EncodedBatch:
    """Encode in a worker process, which loads what that takes at its first batch and keeps it."""
    return _opened(encoder)(batch)


@functools.cache
def _opened(encoder: Encoder) -> Callable[[RawBatch], EncodedBatch]:
    return encoder.opened(load_tokenizer(encoder.tokenizer_path))


def prepare_worker() -> None:
    """Run at the start of a worker process: it ends when its parent is killed, and takes one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
