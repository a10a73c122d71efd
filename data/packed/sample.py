"""What one pack is, as a step of training takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One pack of n tokens: documents (the first and the last may be cut) end to end."""

    tokens: torch.Tensor
    """int64 [n]."""
    labels: torch.Tensor
    """int64 [n], the token after each."""
    loss_mask: torch.Tensor
    """float32 [n]: 0 where the label is the first token of another document, pads, or is not learnt; else 1."""
    cu_seqlens: torch.Tensor
    """int32 [documents + 1], strictly rising from 0 to n: where documents start and end."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors [n, ...] by name, a row a token: what an objective reads besides these."""
    padding: Mapping[str, float] = field(default_factory=dict)
    """What each of ``extra`` is padded with where the pack's end is; 0 where nothing is said."""
    real_tokens: int | None = None
    """Where the padding at its end begins, which no router counts; None: it has none."""


class Packs(Protocol):
    """A sized, indexed source of packs, such as ``packed.PackedDataset``."""

    def __len__(self) -> int:
        """Number of packs."""

    def __getitem__(self, index: int) -> PackedSample:
        """Pack ``index``."""


@dataclass(frozen=True)
class DocumentPiece:
    """What a pack has of one document."""

    corpus: str
    """Prefix of the corpus."""
    document: int
    """Index of the document there."""
    offset: int
    """Tokens of the document before this piece; they are in another pack."""
    start: int
    """First token of the piece in the pack."""
    end: int
    """Token after its last."""


def pad_pack(sample: PackedSample, tokens: int) -> PackedSample:
    """``sample`` with as many tokens at its end as make ``tokens``: a document of zeros, its targets masked.

    ``real_tokens`` of what is padded says where the padding begins.

    Raises:
        ValueError: the sample is longer, or one of ``extra`` has not a row for every token.
    """
    length = len(sample.tokens)
    if length > tokens:
        raise ValueError(f"a pack of {length} tokens can't be padded to {tokens}")
    for name, rows in sample.extra.items():
        if rows.dim() == 0 or len(rows) != length:
            raise ValueError(
                f"extra[{name!r}] has shape {list(rows.shape)}, but the pack {length} tokens: give a row each"
            )
    unknown = sorted(sample.padding.keys() - sample.extra.keys())
    if unknown:
        raise ValueError(f"padding names {unknown[0]!r}, which extra does not have: name one of {sorted(sample.extra)}")
    if length == tokens:
        return sample

    def padded(rows: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        return torch.cat((rows, rows.new_full((tokens - length, *rows.shape[1:]), value)))

    return PackedSample(
        padded(sample.tokens),
        padded(sample.labels),
        padded(sample.loss_mask),
        torch.cat((sample.cu_seqlens, sample.cu_seqlens.new_tensor([tokens]))),
        {name: padded(rows, sample.padding.get(name, 0.0)) for name, rows in sample.extra.items()},
        sample.padding,
        length if sample.real_tokens is None else sample.real_tokens,
    )
