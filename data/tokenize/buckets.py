"""Which corpus a document goes to by its length, so that a stage of long packs can have a share of long documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LengthBuckets:
    """Upper bounds of lengths. Make one with ``parse_length_buckets``."""

    bounds: tuple[int, ...]
    """Tokens, end marks included, rising: a document of as many is in the bucket. What is longer has one of its own."""

    @property
    def suffixes(self) -> list[str]:
        """What the prefixes of the buckets end in, by rising length; without bounds one of nothing."""
        if not self.bounds:
            return [""]
        return [*(f"_up_to_{bound}" for bound in self.bounds), f"_over_{self.bounds[-1]}"]

    def bucket_of(self, lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Bucket of every document [documents] by its tokens, its place among ``suffixes``."""
        return np.searchsorted(np.array(self.bounds, dtype=np.int64), lengths, side="left")

    def described(self, bucket: int) -> dict[str, int | None]:
        """Smallest and largest length of a bucket in tokens, for its sidecar; a largest of None is any."""
        lower = self.bounds[bucket - 1] if bucket else 0
        return {"longer_than": lower, "up_to": self.bounds[bucket] if bucket < len(self.bounds) else None}


NO_BUCKETS = LengthBuckets(())
"""One corpus, whatever the lengths."""


def parse_length_buckets(text: str) -> LengthBuckets:
    """Read bounds such as ``32768,131072``.

    Raises:
        ValueError: they are no rising whole numbers of at least 1.
    """
    try:
        bounds = tuple(int(part) for part in text.split(","))
    except ValueError:
        bounds = ()
    rising = all(before < after for before, after in zip((0, *bounds), bounds, strict=False))
    # What a 32-bit index of lengths could tell apart at all.
    if not bounds or not rising or bounds[-1] >= 2**31:
        raise ValueError(f"{text!r}: give rising numbers of tokens, such as 32768,131072")
    return LengthBuckets(bounds)
