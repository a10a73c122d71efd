"""Lengths of documents as pre-training data has them."""

from __future__ import annotations

import numpy as np


def log_normal_lengths(tokens: int, mean: float, sigma: float, draw: np.random.Generator) -> list[int]:
    """Log-normal lengths with mean ``mean`` that fill ``tokens``; the last document is cut."""
    lengths: list[int] = []
    left = tokens
    while left > 0:
        lengths.append(min(left, max(1, round(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma)))))
        left -= lengths[-1]
    return lengths
