"""How often a run may read each corpus: ``data.max_epochs``."""

from __future__ import annotations

import math

from megatron_m1.config.tree import DataConfig
from megatron_m1.printing import shown

_NAME = "data.max_epochs"


def epoch_caps(data: DataConfig) -> float | dict[str, float]:
    """Return the cap of all corpora, infinite without any, or those of some by prefix, as these are spelt there.

    Raises:
        ValueError: neither one number nor numbers before prefixes, or one that is not above 0; one line.
    """
    items = data.max_epochs
    if not items:
        return math.inf
    if len(items) == 1:
        return _cap(items[0])
    if len(items) % 2:
        raise ValueError(
            f"{_NAME} has {len(items)} items: give one number, or one before each prefix: [4, code, 2, prose]"
        )
    return {prefix: _cap(number) for number, prefix in zip(items[::2], items[1::2], strict=True)}


def _cap(text: str) -> float:
    try:
        cap = float(text)
    except ValueError:
        raise ValueError(f"{_NAME} has {shown(text)} in the place of a number: [4, code, 2, prose]") from None
    if not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"{_NAME} = {shown(text)}: it must be a finite number above 0")
    return cap
