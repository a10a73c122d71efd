"""A tokenised corpus as the stream reads it: mapped files, of which only what is asked for is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_m1.data.corpora.loss_mask import open_loss_mask
from megatron_m1.data.corpora.prefix import INDEX_HEADER_BYTES, check_prefix, idx_path, open_tokens, sampled_content


@dataclass(frozen=True, eq=False)
class Corpus:
    """Views of its files."""

    prefix: str
    content: str
    """Hash of it: what tells it from others, and from what it was before it was made anew, wherever it lies."""
    ids: npt.NDArray[np.integer[Any]] = field(repr=False)
    """Of all documents end to end [tokens]."""
    lengths: npt.NDArray[np.int32] = field(repr=False)
    """Tokens of each document [documents]."""
    offsets: npt.NDArray[np.int64] = field(repr=False)
    """Bytes of ``ids`` before each document [documents]."""
    learnt: npt.NDArray[np.uint8] | None = field(repr=False)
    """0 for ids that are no labels [tokens]; None where all are."""

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return len(self.ids)

    def places(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where ``documents`` begin in ``ids``."""
        return self.offsets[documents] // self.ids.itemsize


def open_corpus(prefix: str) -> Corpus:
    """Map a corpus.

    Raises:
        ValueError: a file is damaged, or has another size than the others ask for.
        FileNotFoundError: the .bin or the .idx is missing.
    """
    documents = check_prefix(prefix).documents
    ids, lengths = open_tokens(prefix)
    place = INDEX_HEADER_BYTES + 4 * documents
    offsets = np.memmap(idx_path(prefix), np.int64, "r", place, (documents,))
    learnt = open_loss_mask(prefix, len(ids))
    # Plain views of the mappings: a slice of a np.memmap costs several times as much.
    views = (np.asarray(ids), np.asarray(lengths), np.asarray(offsets), None if learnt is None else np.asarray(learnt))
    return Corpus(prefix, sampled_content(prefix), *views)
