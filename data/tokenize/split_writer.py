"""Token files of the parts of a corpus, by text and by length, written in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_m1.data.corpora.prefix import idx_path
from megatron_m1.data.tokenize.buckets import NO_BUCKETS, LengthBuckets
from megatron_m1.data.tokenize.documents import Part
from megatron_m1.data.tokenize.encode import EncodedBatch
from megatron_m1.data.tokenize.split import SUFFIXES, WHOLE, Split, joined_mark
from megatron_m1.data.tokenize.token_files import TokenWriter, remove_output
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.printing import counted


@dataclass(frozen=True)
class Parts:
    """Into which files documents go."""

    split: Split = WHOLE
    """By their texts."""
    buckets: LengthBuckets = NO_BUCKETS
    """By their lengths."""

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Part of the split and bucket of each file."""
        return [(part, bucket) for part in self.split.parts for bucket in range(len(self.buckets.suffixes))]

    def suffix(self, part: int, bucket: int) -> str:
        """What the prefix of a file ends in."""
        return self.buckets.suffixes[bucket] + SUFFIXES[part]

    @property
    def suffixes(self) -> list[str]:
        """Those of all files, in the order of ``keys``."""
        return [self.suffix(*key) for key in self.keys]

    def described(self, part: int, bucket: int) -> dict[str, object]:
        """What a sidecar says of the part that its file is."""
        said: dict[str, object] = {}
        if len(self.split.parts) > 1:
            name = SUFFIXES[part].removeprefix("_") or "train"
            said["split"] = {"part": name, "share": self.split.shares[part]}
        if self.buckets.bounds:
            said["bucket"] = self.buckets.described(bucket)
        return said


class SplitWriter:
    """Deals documents out to one ``TokenWriter`` a part.

    Args:
        folders: an empty one for each of ``parts.keys``, on the file system of its output.
        tokenizer: the one that encodes.
        parts: which documents go where.
        append_eod: as of ``TokenWriter``.
        masked: as of ``TokenWriter``.
    """

    def __init__(
        self, folders: Sequence[Path], tokenizer: Tokenizer, parts: Parts, *, append_eod: bool, masked: bool = False
    ) -> None:
        self._parts = parts
        self.masked = masked
        self._files = ExitStack()
        self.writers = {
            key: self._files.enter_context(TokenWriter(folder, tokenizer, append_eod=append_eod, masked=masked))
            for key, folder in zip(parts.keys, folders, strict=True)
        }
        """By part of the split and bucket."""
        self.keys: tuple[str, ...] = ()
        """Of the first record without the text's key: its keys."""
        self.details: dict[str, str] = {}
        """As of ``EncodedBatch``, of all batches."""
        self.remarks: Counter[str] = Counter()
        """As of ``EncodedBatch``, of all batches."""
        self._first = self.writers[parts.keys[0]]
        self._ends = int(append_eod)
        self._mark = self._length = 0

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
        return self._first.skipped

    def add(self, batch: EncodedBatch) -> None:
        """Append the documents of a batch where they belong; errors as of ``TokenWriter.add``."""
        self.keys = self.keys or batch.keys
        self.details = {**batch.details, **self.details}
        self.remarks += batch.remarks
        if batch.part is Part.WHOLE:
            self._add_whole(batch)
            return
        if batch.part is Part.FIRST:
            self._mark = self._length = 0
        if batch.marks.size:
            self._mark = joined_mark(self._mark, int(batch.marks[0]), int(batch.sizes[0]))
        self._length += batch.tokens.size
        # The parts wait with the first file's documents until the last one tells whose they are.
        (key,) = self._keys_of(np.array([self._mark], np.uint64), np.array([self._length + self._ends]))
        self._first.add(batch, owner=self.writers[key])

    def _keys_of(self, marks: npt.NDArray[np.uint64], lengths: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
        parts, buckets = self._parts.split.part_of(marks), self._parts.buckets.bucket_of(lengths)
        return list(zip(parts.tolist(), buckets.tolist(), strict=True))

    def _add_whole(self, batch: EncodedBatch) -> None:
        if len(self.writers) == 1:
            self._first.add(batch)
            return
        parts, buckets = self._parts.split.part_of(batch.marks), self._parts.buckets.bucket_of(batch.lengths)
        for (part, bucket), writer in self.writers.items():
            mine = (parts == part) & (buckets == bucket)
            of_tokens = np.repeat(mine, batch.lengths)
            writer.add(
                EncodedBatch(
                    batch.tokens[of_tokens],
                    batch.lengths[mine],
                    int(batch.sizes[mine].sum()),
                    batch.skipped if writer is self._first else Counter(),
                    loss=None if batch.loss is None else batch.loss[of_tokens],
                )
            )

    def check_parts(self) -> None:
        """Check that no part of the split is empty; a bucket may be.

        Raises:
            ValueError: one is; says which.
        """
        split = self._parts.split
        for part in split.parts:
            if not any(writer.documents for key, writer in self.writers.items() if key[0] == part):
                name = SUFFIXES[part].removeprefix("_") or "training"
                raise ValueError(
                    f"--split gives the {name} part {split.shares[part]:.4g} of "
                    f"{counted(self.documents, 'document')}, and by chance none: give it a larger share, or hold out a "
                    "file of your own"
                )

    def commit(self, prefix: str, *, described: Mapping[str, object]) -> None:
        """Replace older outputs of all parts. A kill in between leaves no part beside an old one of another cut.

        Args:
            prefix: of the outputs.
            described: what every sidecar says of how the documents were made. Of an empty bucket no file is left.
        """
        for key in self.writers:
            idx_path(prefix + self._parts.suffix(*key)).unlink(missing_ok=True)
        for key, writer in self.writers.items():
            name = prefix + self._parts.suffix(*key)
            if writer.documents:
                writer.commit(name, described={**self._parts.described(*key), **described})
            else:
                remove_output(name)
