"""What a tokenising process does to a batch. Without torch or megatron-core, so that the process starts at once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_m1.data.readers import BadDocumentError, RawBatch, SkipReason, document_text
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of a batch as ids, in their order."""

    tokens: npt.NDArray[np.int32]
    """All ids end to end [tokens]."""
    lengths: list[int]
    """Ids of each document."""
    text_bytes: int
    """UTF-8 bytes of the documents that were kept."""
    skipped: Counter[str]
    """Documents left out, by reason."""


def encode_batch(tokenizer: Tokenizer, batch: RawBatch, *, text_key: str, append_eod: bool) -> EncodedBatch:
    """Parse and tokenise the documents of a batch; bad ones are counted, not raised."""
    ids: list[int] = []
    lengths: list[int] = []
    skipped: Counter[str] = Counter()
    text_bytes = 0
    for payload in batch.payloads:
        try:
            text = document_text(batch.kind, payload, text_key=text_key)
        except BadDocumentError as bad:
            skipped[bad.reason.value] += 1
            continue
        document = tokenizer.encode(text)
        if not document:
            skipped[SkipReason.EMPTY.value] += 1
            continue
        if append_eod:
            document.append(tokenizer.eod)
        ids += document
        lengths.append(len(document))
        text_bytes += len(text.encode("utf-8"))
    return EncodedBatch(np.array(ids, dtype=np.int32), lengths, text_bytes, skipped)


def encode_batch_in_worker(tokenizer_path: Path, batch: RawBatch, text_key: str, append_eod: bool) -> EncodedBatch:
    """:func:`encode_batch` in a worker process, which loads the tokenizer at its first batch and keeps it."""
    return encode_batch(_loaded(tokenizer_path), batch, text_key=text_key, append_eod=append_eod)


@functools.cache
def _loaded(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def prepare_worker() -> None:
    """Run at the start of a worker process: it ends when its parent is killed, and takes one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
