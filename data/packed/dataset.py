"""Packed samples on megatron-core's datasets: documents end to end, with their bounds, nothing padded.

The order of the packs depends on the corpus, ``sequence_length``, ``num_samples`` and ``seed`` only, never on the mesh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_m1.data.corpora.blend import check_blend, parse_blend
from megatron_m1.data.corpora.ids import check_token_ids
from megatron_m1.data.corpora.loss_mask import open_loss_mask
from megatron_m1.data.corpora.prefix import check_prefix, fingerprint
from megatron_m1.data.packed.sample import DocumentPiece, PackedSample
from megatron_m1.files import file_lock


class TokenizerFacts(Protocol):
    """What packing asks of a tokenizer; ``megatron_m1.data.tokenizers.load.Tokenizer`` has it."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def eod(self) -> int:
        """Id that ends a document."""

    def digest(self) -> str:
        """Hash of its content."""


@dataclass(frozen=True)
class _DatasetTokenizer:
    """What ``GPTDataset`` reads of a tokenizer. It masks and zeroes tokens equal to ``pad``: no real id may be it."""

    vocab_size: int
    eod: int
    digest: str
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"digest": self.digest}


class _DocumentPacks(GPTDataset):
    """``GPTDataset`` that takes empty documents, and tells whether the label after the last token opens another one.

    Its ``cu_seqlens`` cannot tell: they end at n whether or not the document goes on. And they have room for as many
    documents as tokens.
    """

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, list[int]]:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        return text, documents, [length for length in lengths if length]

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        assert idx is not None
        sample = super().__getitem__(idx)
        _, offset_of_label = self.sample_index[int(self.shuffle_index[idx]) + 1]
        sample["label_opens_document"] = torch.tensor(int(offset_of_label) == 0)
        if self._learnt is not None:
            sample["label_is_learnt"] = torch.from_numpy(self._labels_learnt(idx, self._learnt) != 0)
        return sample

    @cached_property
    def _learnt(self) -> npt.NDArray[np.uint8] | None:
        """A byte a token of the corpus, 0 for what is no label; None where all are."""
        prefix = self.dataset.path_prefix
        return open_loss_mask(prefix, check_prefix(prefix).tokens)

    def _labels_learnt(self, idx: int, learnt: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """What ``learnt`` says of each label of pack ``idx`` [n]."""
        index = self.dataset.index
        item = index.dtype_size
        parts = []
        for piece in self.pieces(idx):
            start = int(index.sequence_pointers[piece.document]) // item + piece.offset
            parts.append(learnt[start : start + piece.end - piece.start])
        place, offset = self.sample_index[int(self.shuffle_index[idx]) + 1].tolist()
        # An empty document has no token to be a label.
        while index.sequence_lengths[self.document_index[place]] == offset:
            place, offset = place + 1, 0
        last = int(index.sequence_pointers[self.document_index[place]]) // item + offset
        return np.concatenate([*parts, learnt[last : last + 1]])[1:]

    def pieces(self, idx: int) -> list[DocumentPiece]:
        """What pack ``idx`` is made of, in its order; it must have been read before, which opens the indices."""
        place = int(self.shuffle_index[idx])
        (first, offset), (last, _) = self.sample_index[place].tolist(), self.sample_index[place + 1].tolist()
        found: list[DocumentPiece] = []
        begin, tokens = 0, self.config.sequence_length
        for document in self.document_index[first : last + 1].tolist():
            taken = min(int(self.dataset.sequence_lengths[document]) - offset, tokens - begin)
            if taken:
                found.append(DocumentPiece(self.dataset.path_prefix, document, offset, begin, begin + taken))
            begin, offset = begin + taken, 0
        return found


class PackedDataset:
    """``num_samples`` packs in their final order; made by :func:`build_packed_dataset`."""

    def __init__(self, packs: Any, *, sequence_length: int, num_samples: int, reset_at_documents: bool) -> None:
        self._packs = packs
        self._num_samples = num_samples
        self.sequence_length = sequence_length
        self.reset_at_documents = reset_at_documents

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> PackedSample:
        raw = self._raw(index)
        tokens, labels = raw["tokens"], raw["labels"]
        # GPTDataset hands out its cached mask itself the first time: changing that one would spoil all later packs.
        loss_mask = raw["loss_mask"].clone()
        if "label_is_learnt" in raw:
            loss_mask[~raw["label_is_learnt"]] = 0.0
        if not self.reset_at_documents:
            whole_pack = torch.tensor([0, self.sequence_length], dtype=torch.int32)
            return PackedSample(tokens, labels, loss_mask, whole_pack)
        cu_seqlens = torch.unique_consecutive(raw["cu_seqlens"])  # [n + 1], padded with n -> [documents + 1]
        loss_mask[cu_seqlens[1:-1].long() - 1] = 0.0
        if raw["label_opens_document"]:
            loss_mask[-1] = 0.0
        return PackedSample(tokens, labels, loss_mask, cu_seqlens)

    def pieces(self, index: int) -> list[DocumentPiece]:
        """Where the tokens of pack ``index`` are from: documents end to end, empty ones left out."""
        self._raw(index)
        if isinstance(self._packs, BlendedDataset):
            corpus = self._packs.datasets[self._packs.dataset_index[index]]
            return list(corpus.pieces(int(self._packs.dataset_sample_index[index])))
        return list(self._packs.pieces(index))

    def _raw(self, index: int) -> Mapping[str, torch.Tensor]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"pack {index} of {self._num_samples}")
        raw: Mapping[str, torch.Tensor] = self._packs[index]
        return raw


def build_packed_dataset(
    blend: Sequence[str],
    *,
    sequence_length: int,
    num_samples: int,
    seed: int,
    tokenizer: TokenizerFacts,
    cache_folder: str | Path,
    reset_at_documents: bool = True,
) -> PackedDataset:
    """Build ``num_samples`` packs from a blend; small corpora are repeated, each repetition in another order.

    With ``torch.distributed`` initialised it is collective over all ranks: rank 0 builds the sample indices, the others
    read them from ``cache_folder``, which they must share.

    Args:
        blend: ``[weight, prefix, weight, prefix, ...]`` or ``[prefix, ...]``, see ``blend.parse_blend``. The weights
            are shares of packs. Training and validation have blends, and datasets, of their own.
        sequence_length: tokens n of one pack, at least 2.
        num_samples: packs, at least 1. Which packs they are depends on it: with another number all are others.
        seed: of the order of documents and packs.
        tokenizer: the one that made the corpora.
        cache_folder: sample indices are kept here and reused; made if missing.
        reset_at_documents: False makes each pack one document: ``cu_seqlens`` is [0, n] and no label is masked.

    Raises:
        ValueError: bad numbers or blend, a damaged corpus, one made with another tokenizer, with ids that the
            tokenizer does not have, or without a token to predict; or ``cache_folder`` can't be written.
        FileNotFoundError: a .bin or .idx is missing.
    """
    _check_arguments(sequence_length, num_samples, tokenizer)
    relative_prefixes, weights = parse_blend(blend)
    for summary in check_blend(blend, tokenizer_digest=tokenizer.digest()):
        open_loss_mask(summary.prefix, summary.tokens)
    prefixes = [os.path.abspath(prefix) for prefix in relative_prefixes]
    with _one_line(Path(cache_folder)):
        check_token_ids(prefixes, vocab_size=tokenizer.vocab_size, cache_folder=Path(cache_folder))
    facts = _DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.digest())
    key = [prefixes, weights, [fingerprint(p) for p in prefixes], sequence_length, num_samples, seed, facts.digest]
    with _index_folder(Path(cache_folder), key) as folder:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend_per_split=[(prefixes, weights), None, None],
            path_to_cache=str(folder),
            tokenizer=facts,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            inter_document_masking=True,
            # Room for the rounding of every corpus's share, without which a small blend is refused.
            mid_level_dataset_surplus=max(0.005, (len(prefixes) + 1) / num_samples),
        )
        packs, _, _ = BlendedMegatronDatasetBuilder(_DocumentPacks, [num_samples, 0, 0], lambda: True, config).build()
    return PackedDataset(
        packs, sequence_length=sequence_length, num_samples=num_samples, reset_at_documents=reset_at_documents
    )


def _check_arguments(sequence_length: int, num_samples: int, tokenizer: TokenizerFacts) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; a pack needs at least 2 tokens")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; ask for at least 1 pack")
    eod, vocab_size = tokenizer.eod, tokenizer.vocab_size
    if not 0 <= eod < vocab_size:
        raise ValueError(f"the tokenizer ends documents with id {eod} but has ids below {vocab_size}; take another one")


@contextmanager
def _index_folder(cache_folder: Path, key: list[Any]) -> Iterator[Path]:
    """Folder of the sample indices that belong to ``key``; what a killed build left there is dropped first.

    ``GPTDataset`` takes any file of the right name for a whole one, its names do not depend on the corpus's content,
    and it asks NumPy for pickles, which only the mapping of files refuses.
    """
    with _one_line(cache_folder):
        cache_folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    folder = cache_folder / name
    distributed = torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        # The builder lets other ranks read only after rank 0 has built.
        yield folder
        return
    complete = folder / "complete"
    with _one_line(cache_folder), file_lock(cache_folder / f"{name}.lock"):
        if folder.exists() and not (complete.exists() and _are_numbers(folder)):
            shutil.rmtree(folder)
        yield folder
        complete.touch()


def _are_numbers(folder: Path) -> bool:
    """Whether every index is an array of numbers, which can be read without unpickling anything."""
    for path in folder.rglob("*.npy"):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
    return True


@contextmanager
def _one_line(cache_folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"the sample indices in {cache_folder} can't be written: {error.strerror or error}{place}; make room or "
            "choose another data.cache_folder"
        ) from error
