"""Which tokens of a corpus are learnt: ``<prefix>.loss``, a byte a token in the order of the ``.bin``.

A corpus without that file, as text is tokenised, is learnt whole.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_m1.data.corpora.prefix import names_loss_mask, sidecar_path


def loss_path(prefix: str) -> Path:
    """The file of ``prefix`` that tells which of its tokens are learnt."""
    return Path(f"{prefix}.loss")


def open_loss_mask(prefix: str, tokens: int) -> npt.NDArray[np.uint8] | None:
    """Map the loss mask of a corpus into memory.

    Args:
        prefix: path of the corpus without ``.bin``.
        tokens: that its index tells of.

    Returns:
        A byte for each token [tokens]: 0 where it is no label, 1 where it is one; None if the corpus has no mask.

    Raises:
        ValueError: the file has another number of bytes, can't be read, or is missing although the sidecar names it:
            without it everything would be learnt.
    """
    path = loss_path(prefix)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        if names_loss_mask(prefix):
            raise ValueError(
                f"{path} is missing, and {sidecar_path(prefix)} names it: put it beside its corpus, or tokenise the"
                " corpus again"
            ) from None
        return None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    if size != tokens:
        raise ValueError(
            f"{path} has {size:,} bytes, its corpus {tokens:,} tokens, and needs a byte for each: tokenise the corpus"
            " again, or move the file if it is of another corpus"
        )
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(tokens,))
