"""Settings that the tree no longer has, and what they mean in it: old files, old checkpoints and old commands go on."""

from __future__ import annotations

from typing import Any

ATTENTION_PERIOD = "model.attention_period"
"""Every so many layers, one was softmax attention and the others lightning attention."""
MIXERS = "model.mixers"
TRAIN_SAMPLES = "data.train_samples"
"""Packs in a pass over the data, whose order depended on it; a stream of data has no passes."""
OLDER = (ATTENTION_PERIOD, TRAIN_SAMPLES)
"""Dotted paths that are read and never written."""
LONGEST_PERIOD = 100_000
"""As many as a model may have layers."""


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings by dotted path, from one file or from one command line, with older ones in today's terms.

    Raises:
        ValueError: an older one has no possible value, or today's stands beside it; one line.
    """
    values = {path: value for path, value in values.items() if path != TRAIN_SAMPLES}
    if ATTENTION_PERIOD not in values:
        return values
    if MIXERS in values:
        raise ValueError(f"{ATTENTION_PERIOD} and {MIXERS} both say which layers are softmax attention: give {MIXERS}")
    given = values[ATTENTION_PERIOD]
    # A number in YAML, a text on the command line.
    text = str(given)
    period = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(LONGEST_PERIOD)) else 0
    if not 1 <= period <= LONGEST_PERIOD:
        limits = f"an integer from 1 to {LONGEST_PERIOD:,}"
        raise ValueError(f"{ATTENTION_PERIOD} = {given!r}: it must be {limits}, or give {MIXERS} instead")
    rest = {path: value for path, value in values.items() if path != ATTENTION_PERIOD}
    return rest | {MIXERS: ["lightning"] * (period - 1) + ["softmax"]}
