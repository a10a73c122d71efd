"""How often a source may be seen: what its cap in epochs allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_m1.data.corpora.prefix import check_prefix


def token_limit(prefix: str, tokens: int, max_epochs: Mapping[str, float]) -> float:
    """Tokens that a corpus of ``tokens`` may give; ``math.inf`` without a cap.

    Raises:
        ValueError: the cap is not above 0.
    """
    epochs = max_epochs.get(prefix, math.inf)
    if not epochs > 0.0:
        raise ValueError(f"data.max_epochs of {prefix} is {epochs}: give epochs above 0, or drop the corpus")
    return epochs * tokens


def check_max_epochs(prefixes: Sequence[str], max_epochs: Mapping[str, float], tokens: int) -> None:
    """Check that corpora have tokens enough for a run, which reads their indices' headers only.

    That the blend never asks for a corpus with others used up is not known here: only the sum is looked at.

    Args:
        prefixes: all corpora of the run.
        max_epochs: of each prefix; one that is not named has no cap.
        tokens: that the run takes, of all its stages.

    Raises:
        ValueError: all together allow fewer tokens, or a cap is not above 0.
        FileNotFoundError: a corpus is missing.
    """
    allowed = sum(token_limit(prefix, check_prefix(prefix).tokens, max_epochs) for prefix in prefixes)
    if allowed < tokens:
        raise ValueError(
            f"the run takes {tokens:,} tokens, but data.max_epochs allows {math.floor(allowed):,} of data.train: raise "
            "it, add a corpus, or train fewer tokens"
        )
