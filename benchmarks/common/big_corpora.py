"""Tokenised corpora of any size: real indices, and token files with holes instead of tokens."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt


def log_normal(documents: int, mean: float, sigma: float, draw: np.random.Generator) -> npt.NDArray[np.int32]:
    """Lengths with mean ``mean``, none of them 0."""
    lengths = draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, documents)
    return np.maximum(1, np.rint(lengths)).astype(np.int32)


def big_corpus(prefix: Path, lengths: npt.NDArray[np.int32]) -> int:
    """Write ``prefix``.idx and, sparse, ``prefix``.bin of uint16 ids; return the bytes of the former."""
    documents = len(lengths)
    ends = 2 * np.cumsum(lengths, dtype=np.int64)
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        for array in (lengths, ends - 2 * lengths, np.arange(documents + 1)):
            array.tofile(stream)
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(int(ends[-1]))
    return Path(f"{prefix}.idx").stat().st_size
