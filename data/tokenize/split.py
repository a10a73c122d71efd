"""Which documents are held out: a matter of a document's text alone.

So it does not depend on the number of processes, on the order of files, on the tokenizer or on where large documents
are cut, and a text that comes twice is on one side both times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

SUFFIXES = ("", "_validation", "_test")
"""What the prefixes of the parts end in."""
_PRIME = 2**61 - 1
_POINTS = 2**64


@dataclass(frozen=True)
class Split:
    """Shares of a corpus. Make one with ``parse_split``."""

    shares: tuple[float, ...]
    """Of training, validation and test, as far as given; they sum to 1 and only the first must be above 0."""

    @property
    def parts(self) -> list[int]:
        """The parts that get documents, by their place in ``shares``."""
        return [part for part, share in enumerate(self.shares) if share > 0]

    def part_of(self, marks: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Part of every document [documents] by the mark of its text.

        Training comes first on the scale: what is held out with a share is held out with a larger one too.
        """
        ends = [min(int(end * _POINTS), _POINTS - 1) for end in np.cumsum(self.shares)[:-1]]
        places = np.searchsorted(np.array(ends, dtype=np.uint64), _scattered(marks), side="right")
        # Rounding may leave a sliver of the scale to a part whose share is 0.
        return np.where(np.isin(places, self.parts), places, 0)


WHOLE = Split((1.0,))
"""Everything is for training."""


def parse_split(text: str) -> Split:
    """Read shares: ``0.99,0.01`` or, as Megatron has it, ``969,30,1`` for training, validation and test.

    Raises:
        ValueError: they are no two or three numbers, one is below 0 or not finite, or none is left to train on.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    if len(numbers) not in (2, 3) or not all(n >= 0 and isfinite(n) for n in numbers) or not isfinite(total):
        raise ValueError(
            f"{text!r}: give the shares of training and validation, such as 0.99,0.01, or of a test part as "
            "well, such as 969,30,1"
        )
    if not numbers[0] > 0 or not numbers[0] / total > 0:
        raise ValueError(f"{text!r} leaves nothing to train on: the first share must be above 0")
    return Split(tuple(number / total for number in numbers))


def text_mark(text: str) -> int:
    """Return a number below 2^61 that a text has in common with few others: it follows from its parts' as well."""
    return int.from_bytes(text.encode("utf-8")) % _PRIME


def joined_mark(before: int, after: int, after_bytes: int) -> int:
    """Mark of two texts end to end from the marks of both, and the UTF-8 bytes of the second."""
    return (before * pow(256, after_bytes, _PRIME) + after) % _PRIME


def _scattered(marks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers all over 64 bits from similar ones (splitmix64's last step)."""
    with np.errstate(over="ignore"):
        mixed = marks + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
