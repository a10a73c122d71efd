"""The packs of a run or of corpora, by index: what is wrong with them is said before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_m1.config import Config
from megatron_m1.config.schedules import course
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.data.demo.corpus import find_corpus
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.library.places import AnyPath, Place, as_path, find_place, find_tokenizer
from megatron_m1.library.quiet import quiet_libraries
from megatron_m1.training.blend import caps_by_prefix

if TYPE_CHECKING:
    from megatron_m1.library.packs import PackedData

FIX = "give packed_data(..., tokenizer=PATH)"


@dataclass(frozen=True)
class _Source:
    """What a run says of a split, or nothing of it where corpora are given by themselves."""

    blend: list[str]
    place: Place
    seq_length: int | None = None
    num_samples: int | None = None
    seed: int = 1234
    cache_folder: str | None = None
    reset_at_documents: bool = True
    packing: Literal["chop", "best_fit"] = "chop"
    max_epochs: dict[str, float] = field(default_factory=dict)
    """By prefix."""


def packed_data(
    source: AnyPath | Config | Sequence[str],
    *,
    split: Literal["train", "validation"] = "train",
    seq_length: int | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    tokenizer: AnyPath | Tokenizer | None = None,
    cache_folder: AnyPath | None = None,
    reset_at_documents: bool | None = None,
) -> PackedData:
    """Open the packs that a run trains or validates on, or those of any tokenised corpora. No mesh is needed.

    Pack i of a run's training data is the i-th that it took. They have an order only, so that the first look at pack i
    plans those before it, from lengths of documents and without reading them: some 50 microseconds each. Going back is
    cheap. Where torch.distributed is running, all its ranks call this together, and with a folder that they share.

    Args:
        source: a run or a checkpoint; a configuration; the prefix of a corpus (PREFIX.bin and PREFIX.idx); or a blend,
            ``[prefix, ...]`` or ``[weight, prefix, ...]``.
        split: of a run or configuration, what it trains on or what is held out.
        seq_length: tokens of a pack; None takes the run's. Corpora by themselves have none.
        num_samples: packs; None takes the run's, or as many as corpora by themselves fill once.
        seed: of the order of documents and packs; None takes the run's, or 1234.
        tokenizer: that of the corpora, or its path; None takes the run's. Corpora by themselves have none.
        cache_folder: where the indices of held-out packs are kept, and what was found in the corpora; None takes the
            run's if it can be written, or none.
        reset_at_documents: whether documents are apart; None takes the run's, or True.

    Raises:
        ValueError: the source is none of these, a corpus or the tokenizer is missing or damaged, they don't belong
            together, or a number is missing or out of range; one line.
    """
    _check_number("seq_length", seq_length, 2, 2**62)
    _check_number("num_samples", num_samples, 1, 2**62)
    _check_number("seed", seed, 0, 2**32 - 1)
    if split not in ("train", "validation"):
        raise ValueError(f"split = {split!r}: give train or validation")
    found = _find_source(source, split)
    tokens = _tokens(found.blend)
    loaded = find_tokenizer(found.place, tokenizer, fix=FIX)
    if isinstance(loaded, str):
        raise ValueError(loaded)
    length = found.seq_length if seq_length is None else seq_length
    if length is None:
        raise ValueError("seq_length is missing: corpora have none, give the tokens of a pack")
    with quiet_libraries():
        from megatron_m1.library.packs import build_packed_data

        return build_packed_data(
            found.blend,
            is_trained_on=split == "train",
            seq_length=length,
            num_samples=num_samples or found.num_samples or max(1, tokens // max(1, length)),
            seed=found.seed if seed is None else seed,
            tokenizer=loaded,
            cache_folder=found.cache_folder if cache_folder is None else str(as_path(cache_folder)),
            reset_at_documents=found.reset_at_documents if reset_at_documents is None else reset_at_documents,
            packing=found.packing,
            max_epochs=found.max_epochs,
        )


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if value is not None and not (isinstance(value, Integral) and least <= int(value) <= most):
        raise ValueError(f"{name} = {value!r}: give an integer from {least} to {most:,}")


def _find_source(source: AnyPath | Config | Sequence[str], split: Literal["train", "validation"]) -> _Source:
    if isinstance(source, Config):
        tokenizer = Path(source.data.tokenizer) if source.data.tokenizer else None
        return _of_config(source, split, Place(Path(source.run.folder), tokenizer, source))
    if not isinstance(source, str | os.PathLike):
        return _Source(_blend(source), _nowhere())
    path = as_path(source)
    if not path.is_dir():
        return _Source([str(path)], _nowhere())
    place = find_place(path)
    if place.config is None:
        raise ValueError(f"{path} is a Hugging Face folder, which has no data: give a run or the prefix of a corpus")
    return _of_config(place.config, split, place)


def _blend(given: Any) -> list[str]:
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        raise ValueError(f"source = {given!r}: give a run, a configuration, the prefix of a corpus, or a blend")
    return [str(item) for item in given]


def _nowhere() -> Place:
    return Place(Path("the corpus"), None, None)


def _of_config(config: Config, split: Literal["train", "validation"], place: Place) -> _Source:
    data, train = config.data, config.train
    blends = {"train": data.train, "validation": data.validation}
    if data.embedded_corpus is not None and not blends[split]:
        corpus = find_corpus(data.embedded_corpus, vocab_size=config.model.vocab_size)
        if corpus is None:
            raise ValueError(f"data.embedded_corpus = {data.embedded_corpus} is not built yet: train on it first")
        blends = {"train": corpus.train, "validation": corpus.validation}
        place = place if data.tokenizer else Place(place.folder, corpus.tokenizer, config)
    if not blends[split]:
        raise ValueError(f"data.{split} of {place.folder} is empty: give a run that has it, or the prefix of a corpus")
    if split == "train" and config.stages:
        names = ", ".join(stage.name for stage in config.stages)
        raise ValueError(
            f"{place.folder} is a run of several stages ({names}), each with packs of its own: give a blend"
        )
    # A folder of someone else's, or of a run that was moved, has nothing to do with ours.
    is_writable = data.cache_folder is not None and os.access(data.cache_folder, os.W_OK)
    return _Source(
        blends[split],
        place,
        data.seq_length,
        course(config)[-1].end // data.seq_length if split == "train" else train.eval_samples,
        train.seed,
        data.cache_folder if is_writable else None,
        data.reset_at_documents,
        data.packing,
        caps_by_prefix(data, blends[split]),
    )


def _tokens(blend: Sequence[str]) -> int:
    """Tokens of all corpora together.

    Raises:
        ValueError: one is missing or damaged.
    """
    try:
        return sum(check_prefix(prefix).tokens for prefix in parse_blend(blend)[0])
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
