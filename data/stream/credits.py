"""Which source gives the next pack: shares of packs, kept to within a pack at any time."""

from __future__ import annotations

from collections.abc import Sequence


class Credits:
    """Every pack credits each source with its weight, and takes one from the credit of the source that gives it.

    The source with the greatest credit gives, the first one of equals. What a source has given is then never a pack
    more than the sum of its weights, however they change from pack to pack.
    """

    def __init__(self, credits: Sequence[float]) -> None:
        self.credits = list(credits)
        """Packs that each source is owed."""

    def choose(self, weights: Sequence[float], usable: Sequence[bool]) -> int | None:
        """Deal one pack.

        Args:
            weights: of each source, at least 0; those that are not usable give theirs to the others.
            usable: whether it has a pack.

        Returns:
            The source; None if none is usable that has a weight.
        """
        total = sum(weight for weight, use in zip(weights, usable, strict=True) if use)
        if not total > 0.0:
            return None
        best = -1
        for source, (weight, use) in enumerate(zip(weights, usable, strict=True)):
            if use and weight > 0.0:
                self.credits[source] += weight / total
                if best < 0 or self.credits[source] > self.credits[best]:
                    best = source
        self.credits[best] -= 1.0
        return best
