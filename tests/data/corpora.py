"""Small tokenised corpora, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 1


@dataclass(frozen=True)
class FakeTokenizer:
    """Names the ids of a corpus that no tokenizer made."""

    vocab_size: int = 65_536
    eod: int = EOD

    def digest(self) -> str:
        return "0" * 64


def write_corpus(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    *,
    tokenizer_digest: str | None = None,
    dtype: type[np.integer[Any]] = np.uint16,
) -> str:
    """Write documents of token ids as .bin and .idx, with a sidecar if there is a digest; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    if tokenizer_digest is not None:
        sidecar = {
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "tokenizer_digest": tokenizer_digest,
        }
        Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    return str(prefix)


def unique_documents(lengths: Sequence[int], *, first_id: int = 2, eod: int | None = EOD) -> list[list[int]]:
    """Documents of the given lengths whose tokens are all different, so that every token tells where it came from.

    ``eod`` replaces each document's last token; None leaves the documents without an end mark.
    """
    documents, next_id = [], first_id
    for length in lengths:
        document = list(range(next_id, next_id + length))
        next_id += length
        if eod is not None:
            document[-1] = eod
        documents.append(document)
    return documents
