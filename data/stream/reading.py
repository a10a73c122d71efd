"""From a plan to the tensors of its pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_m1.data.packed import PackedSample, pad_pack
from megatron_m1.data.stream.corpus import Corpus
from megatron_m1.data.stream.plan import PackPlan


def read_pack(plan: PackPlan, corpus: Corpus, *, reset_at_documents: bool) -> PackedSample:
    """Read what a plan names. Its cost is that of its pack, wherever the corpus has its documents.

    A label counts where it is the next token of the same document; without ``reset_at_documents``, wherever it is the
    next token. It never counts where the corpus says that it is not learnt.

    Args:
        plan: of a pack.
        corpus: the one it names.
        reset_at_documents: False makes the documents one.
    """
    pieces, following = plan.filling.pieces, plan.filling.following
    places = corpus.places(pieces.documents)
    starts, ends = places + pieces.starts, places + pieces.ends
    after = 0 if following is None else int(corpus.places(np.array([following[0]]))[0]) + following[1]
    # int64 [tokens + 1], the last one only a label
    ids = torch.from_numpy(_gathered(corpus.ids, starts, ends, after).astype(np.int64))
    if following is None:
        ids[-1] = 0
    tokens = len(ids) - 1
    mask = torch.ones(tokens)
    if corpus.learnt is not None:
        learnt = _gathered(corpus.learnt, starts, ends, after)[1:]
        mask = torch.from_numpy((learnt != 0).astype(np.float32))
    bounds = np.concatenate(([0], np.cumsum(ends - starts)))
    if following is None or (reset_at_documents and not plan.filling.is_cut):
        mask[-1] = 0.0
    if reset_at_documents:
        mask[torch.from_numpy(bounds[1:-1] - 1)] = 0.0
    else:
        bounds = bounds[[0, -1]]
    sample = PackedSample(ids[:-1], ids[1:], mask, torch.from_numpy(bounds.astype(np.int32)))
    return pad_pack(sample, plan.length)


def _gathered(
    values: npt.NDArray[Any], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], after: int
) -> npt.NDArray[Any]:
    """The values from ``starts`` to ``ends`` one after another, and the one at ``after``."""
    parts = [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.concatenate([*parts, values[after : after + 1]])
