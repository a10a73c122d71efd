"""How tokens are chosen: what can be said and checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int = 64
    """New tokens of each sequence, at most."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest most likely ones that have this much probability together."""
    seed: int = 1234
    """Of the draws; every sequence has a stream of its own, so that others don't change it."""
    chunk_tokens: int = 2048
    """Prompt tokens of a pass, all sequences together."""
    stop: int | None = None
    """Id that ends a sequence; it is not returned."""

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one is no number of its kind, or out of its range.
        """
        for name in ("max_tokens", "chunk_tokens", "seed"):
            if not isinstance(value := getattr(self, name), Integral):
                raise ValueError(f"{name} = {value!r}: give an integer")
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real):
                raise ValueError(f"{name} = {value!r}: give a number")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: give 1 or more")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}: give 1 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: give a share above 0, up to 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: give 0 to 2^63 - 1")
