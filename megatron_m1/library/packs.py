"""Packs by index, with the documents that they are made of."""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.packed import PackedDataset, PackedSample, build_packed_dataset
from megatron_m1.data.stream import IndexedPacks, Stream, StreamConfig, Stretch, open_stream
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.printing import counted


@dataclass(frozen=True, eq=False, repr=False)
class PackedDocument:
    """A document in a pack, or the piece of one that is there."""

    corpus: str
    """Prefix of its corpus."""
    index: int
    """Which document of the corpus it is, from 0."""
    offset: int
    """Tokens of the document before this piece."""
    start: int
    """Where it begins in the pack."""
    end: int
    """Where it ends there."""
    tokens: Tensor
    """int64 [end - start]."""
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        return f"<PackedDocument {self.index} of {self.corpus}: {len(self.tokens):,} tokens from {self.offset:,}>"

    @property
    def text(self) -> str:
        """Its text; where a piece was cut within a character, what the tokenizer makes of the rest."""
        return self.tokenizer.decode(self.tokens.tolist())


@dataclass(frozen=True, eq=False, repr=False)
class Pack(PackedSample):
    """One pack of n tokens, as a step of training takes it, and what it is made of."""

    documents: tuple[PackedDocument, ...] = ()
    """In their order; where documents flow into each other, ``cu_seqlens`` has fewer bounds than there are here."""

    def __repr__(self) -> str:
        return f"<Pack: {len(self.tokens):,} tokens, {counted(len(self.documents), 'document')}>"


class PackedData(Sequence[Pack]):
    """Packs in their final order, as ``megatron_m1.packed_data`` returns them. Slices are lists."""

    def __init__(self, packs: PackedDataset | IndexedPacks, tokenizer: Tokenizer, seq_length: int) -> None:
        self._packs = packs
        self.tokenizer = tokenizer
        """Of the corpora."""
        self.seq_length = seq_length
        """Tokens of every pack."""

    def __repr__(self) -> str:
        return f"<PackedData: {counted(len(self), 'pack')} of {self.seq_length:,} tokens>"

    def __len__(self) -> int:
        return len(self._packs)

    @overload
    def __getitem__(self, index: int) -> Pack: ...

    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...

    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self._pack(i) for i in range(*index.indices(len(self)))]
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"pack {at} of {len(self):,}: give one from {-len(self)} to {len(self) - 1}")
        return self._pack(at % len(self))

    def _pack(self, index: int) -> Pack:
        sample = self._packs[index]
        documents = tuple(
            PackedDocument(
                piece.corpus,
                piece.document,
                piece.offset,
                piece.start,
                piece.end,
                sample.tokens[piece.start : piece.end],
                self.tokenizer,
            )
            for piece in self._packs.pieces(index)
        )
        return Pack(
            sample.tokens,
            sample.labels,
            sample.loss_mask,
            sample.cu_seqlens,
            real_tokens=sample.real_tokens,
            documents=documents,
        )


def build_packed_data(
    blend: Sequence[str],
    *,
    is_trained_on: bool,
    seq_length: int,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_folder: str | None,
    reset_at_documents: bool,
    packing: Literal["chop", "best_fit"],
    max_epochs: Mapping[str, float],
) -> PackedData:
    """Build what ``data.packed_data`` has worked out; without a cache folder, in one that is gone at once.

    Args:
        is_trained_on: packs as training takes them, of a stream; else those of the held-out split, which has neither
            ``packing`` nor ``max_epochs``.

    Raises:
        ValueError: as of ``build_packed_dataset`` or ``open_stream``, or a file is missing.
    """
    with ExitStack() as stack:
        if cache_folder is None:
            # The indices are mapped once they are built, and what is mapped stays without its name.
            cache_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-m1-"))
        try:
            if is_trained_on:
                prefixes, weights = parse_blend(blend)
                config = StreamConfig(prefixes, seq_length, packing, seed, reset_at_documents, max_epochs)
                packs = _stream_packs(config, weights, num_samples, tokenizer, cache_folder)
                return PackedData(packs, tokenizer, seq_length)
            held_out = build_packed_dataset(
                blend,
                sequence_length=seq_length,
                num_samples=num_samples,
                seed=seed,
                tokenizer=tokenizer,
                cache_folder=cache_folder,
                reset_at_documents=reset_at_documents,
            )
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
    return PackedData(held_out, tokenizer, seq_length)


def _stream_packs(
    config: StreamConfig, weights: Sequence[float], num_samples: int, tokenizer: Tokenizer, cache_folder: str
) -> IndexedPacks:
    def open_at(state: Mapping[str, Any] | None) -> Stream:
        return open_stream(
            config,
            tokenizer=tokenizer,
            weights=lambda tokens: weights,
            state=state,
            # The run has said it.
            note=lambda line: None,
            # Ids are checked once: the folder may be gone later.
            cache_folder=cache_folder if state is None else None,
        )

    return IndexedPacks([Stretch(num_samples, open_at)])
