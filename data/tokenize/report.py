"""What became of the documents of a run of ``tokenize``, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_m1.data.tokenize.documents import SkipReason
from megatron_m1.data.tokenize.find import PassedOver
from megatron_m1.data.tokenize.split_writer import Parts, SplitWriter
from megatron_m1.data.tokenize.token_files import TokenWriter
from megatron_m1.printing import counted


@dataclass(frozen=True)
class Bucket:
    """A corpus of documents of some lengths."""

    prefix: str
    documents: int
    """0 of a bucket that is empty: then there is no such corpus."""
    tokens: int
    """End marks included."""
    shortest: int
    """Tokens of the shortest document."""
    median: int
    """Tokens of the middle document by length, the longer of two."""
    longest: int

    def __str__(self) -> str:
        if not self.documents:
            return f"{self.prefix}: no document of these lengths, so no such corpus"
        lengths = f"{self.shortest:,} to {self.longest:,} each, median {self.median:,}"
        return f"{self.prefix}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, {lengths}"


@dataclass(frozen=True)
class HeldOut:
    """A part that was held out."""

    prefix: str
    documents: int
    tokens: int
    """End marks included."""

    def __str__(self) -> str:
        return f"{self.prefix}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, held out"


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the documents: the numbers are of what is left for training."""

    prefix: str
    documents: int
    tokens: int
    """End marks included."""
    text_bytes: int
    """UTF-8 bytes of the documents kept."""
    skipped: dict[str, int]
    """Documents left out, by reason."""
    seconds: float
    passed_over: list[PassedOver] = field(default_factory=list)
    """What of folders and globs was no input."""
    held_out: list[HeldOut] = field(default_factory=list)
    """The other parts, if the corpus was split."""
    keys: tuple[str, ...] = ()
    """Keys of the first record without the text's."""
    buckets: list[Bucket] = field(default_factory=list)
    """The corpora by length, those that are held out included, if there are length buckets."""
    learnt: int | None = None
    """Tokens that are learnt, of conversations; None where all are."""
    details: dict[str, str] = field(default_factory=dict)
    """What is wrong with the first document that was left out, by the reason, where there is more to say."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What was done to documents that were kept, and how often."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        learnt = "" if self.learnt is None else f", {self.learnt:,} of them learnt"
        lines = [
            f"{self.prefix}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}{learnt}, "
            f"{self.bytes_per_token:.2f} bytes per token, skipped: {reasons(self.skipped, self.keys)}, "
            f"{self.seconds:.1f} s"
        ]
        lines += [f"the first {reason}: {detail}" for reason, detail in sorted(self.details.items())]
        lines += [f"{what}: {count:,}" for what, count in sorted(self.remarks.items())]
        return "\n".join([*map(str, self.passed_over), *lines, *map(str, self.held_out), *map(str, self.buckets)])


def reasons(skipped: Mapping[str, int], keys: Sequence[str] = ()) -> str:
    """Spell how many documents were left out and why; ``keys`` are those of the first record without the text's."""
    named = f" (the first such record has {', '.join(keys)})" if keys else ""
    return (
        ", ".join(
            f"{count:,} {reason}{named if reason == SkipReason.KEY_MISSING else ''}"
            for reason, count in sorted(skipped.items())
        )
        or "none"
    )


def report_of(
    writer: SplitWriter, prefix: str, parts: Parts, found: list[PassedOver], seconds: float
) -> TokenizeReport:
    """The report of what a writer has put in place.

    Args:
        writer: after its ``commit``.
        prefix: of the outputs.
        parts: which documents went where.
        found: what of folders and globs was no input.
        seconds: that it took.
    """
    named = [(prefix + parts.suffix(*key), key[0], files) for key, files in writer.writers.items()]
    train = [files for _, part, files in named if part == 0]
    return TokenizeReport(
        prefix,
        sum(files.documents for files in train),
        sum(files.tokens for files in train),
        sum(files.text_bytes for files in train),
        dict(writer.skipped),
        seconds,
        found,
        [HeldOut(name, files.documents, files.tokens) for name, part, files in named if part and files.documents],
        writer.keys,
        [_bucket(name, files) for name, _, files in named] if parts.buckets.bounds else [],
        sum(files.learnt for files in train) if writer.masked else None,
        writer.details,
        dict(writer.remarks),
    )


def _bucket(prefix: str, files: TokenWriter) -> Bucket:
    lengths = np.sort(files.lengths)
    shortest, median, longest = lengths[[0, lengths.size // 2, -1]].tolist() if lengths.size else (0, 0, 0)
    return Bucket(prefix, files.documents, files.tokens, shortest, median, longest)
