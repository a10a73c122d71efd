"""Token files of the parts of a corpus, written in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_m1.data.corpora.prefix import idx_path
from megatron_m1.data.tokenize.documents import Part
from megatron_m1.data.tokenize.encode import EncodedBatch
from megatron_m1.data.tokenize.split import SUFFIXES, Split, joined_mark
from megatron_m1.data.tokenize.token_files import TokenWriter
from megatron_m1.data.tokenizers import Tokenizer


class SplitWriter:
    """Deals documents out to one ``TokenWriter`` a part.

    Args:
        folders: an empty one for each of ``split.parts``, on the file system of its output.
        tokenizer: the one that encodes.
        split: which documents go where.
        append_eod: as of ``TokenWriter``.
    """

    def __init__(self, folders: Sequence[Path], tokenizer: Tokenizer, split: Split, *, append_eod: bool) -> None:
        self._split = split
        self._files = ExitStack()
        self.writers = {
            part: self._files.enter_context(TokenWriter(folder, tokenizer, append_eod=append_eod))
            for part, folder in zip(split.parts, folders, strict=True)
        }
        """By part."""
        self.keys: tuple[str, ...] = ()
        """Of the first record without the text's key: its keys."""
        self._mark = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def documents(self) -> int:
        """Of all parts."""
        return sum(writer.documents for writer in self.writers.values())

    @property
    def skipped(self) -> Counter[str]:
        """Documents left out, by reason: they are on no side."""
        return self.writers[0].skipped

    def add(self, batch: EncodedBatch) -> None:
        """Append the documents of a batch where they belong; errors as of ``TokenWriter.add``."""
        self.keys = self.keys or batch.keys
        if batch.part is Part.WHOLE:
            self._add_whole(batch)
            return
        if batch.part is Part.FIRST:
            self._mark = 0
        if batch.marks.size:
            self._mark = joined_mark(self._mark, int(batch.marks[0]), int(batch.sizes[0]))
        # The parts wait with the training documents until the last one tells whose they are.
        part = int(self._split.part_of(np.array([self._mark], dtype=np.uint64))[0])
        self.writers[0].add(batch, owner=self.writers[part])

    def _add_whole(self, batch: EncodedBatch) -> None:
        if len(self.writers) == 1:
            self.writers[0].add(batch)
            return
        parts = self._split.part_of(batch.marks)
        of_tokens = np.repeat(parts, batch.lengths)
        for part, writer in self.writers.items():
            mine = parts == part
            writer.add(
                EncodedBatch(
                    batch.tokens[of_tokens == part],
                    batch.lengths[mine],
                    int(batch.sizes[mine].sum()),
                    batch.skipped if part == 0 else Counter(),
                )
            )

    def check_parts(self) -> None:
        """Check that no part is empty.

        Raises:
            ValueError: one is; says which.
        """
        for part, writer in self.writers.items():
            if not writer.documents:
                name = SUFFIXES[part].removeprefix("_") or "training"
                raise ValueError(
                    f"--split gives the {name} part {self._split.shares[part]:.4g} of {self.documents:,} documents, "
                    "and by chance none: give it a larger share, or hold out a file of your own"
                )

    def commit(self, prefix: str) -> None:
        """Replace older outputs of all parts. A kill in between leaves no part beside an old one of another cut."""
        for part in self.writers:
            idx_path(prefix + SUFFIXES[part]).unlink(missing_ok=True)
        for part, writer in self.writers.items():
            writer.commit(prefix + SUFFIXES[part], split=self._described(part) if len(self.writers) > 1 else None)

    def _described(self, part: int) -> Mapping[str, object]:
        return {"part": SUFFIXES[part].removeprefix("_") or "train", "share": self._split.shares[part]}
