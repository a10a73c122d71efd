"""What a run needs from the file system, checked before any worker starts: data, tokenizer, run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_m1.checkpoint.contents import check_shape, complete_checkpoints, read_checkpoint
from megatron_m1.checkpoint.folder import step_of
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.io import load_config
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.config.portable import absolute
from megatron_m1.config.written import RESOLVED, read_saved
from megatron_m1.cores import usable_cores
from megatron_m1.data.corpora.blend import check_blend, parse_blend, repeated_corpora, shared_corpora
from megatron_m1.data.corpora.ids import check_token_ids, unread_bytes
from megatron_m1.data.corpora.prefix import PrefixSummary, sidecar_path
from megatron_m1.data.demo.corpus import (
    PreparedCorpus,
    check_own_data,
    find_corpus,
    prepare_corpus,
    vocabulary_notes,
)
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.files import check_writable
from megatron_m1.training.description import repetition_notes
from megatron_m1.training.run_folder import check_run_folder
from megatron_m1.training.run_tokenizer import is_own

PLAN_READS_BYTES = 1 << 30
"""Of corpora that a dry run reads to check their ids: about a second."""


@dataclass(frozen=True)
class DataSummary:
    """What the checked data hold."""

    train: list[PrefixSummary]
    validation: list[PrefixSummary]
    tokenizer_vocab_size: int
    notes: list[str]
    """Lines that the user should read."""


def check_data(config: ResolvedConfig, *, only_plan: bool = False) -> DataSummary:
    """Check the tokenizer and every corpus of both blends against each other and against the model's embedding.

    Args:
        config: resolved.
        only_plan: leave nothing in the cache folder, and don't read more than ``PLAN_READS_BYTES`` of tokens.

    Raises:
        ValueError: with one line that names the file or value and the fix.
    """
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty: name tokenised prefixes, or give data.embedded_corpus a folder")
    if not data.tokenizer:
        none = f", and run.init_from = {config.run.init_from} brings none" if config.run.init_from else ""
        raise ValueError(f"data.tokenizer is empty{none}: name the tokenizer that made data.train")
    try:
        tokenizer = load_tokenizer(data.tokenizer)
    except OSError as error:
        raise ValueError(f"data.tokenizer = {data.tokenizer} can't be read: {error.strerror or error}") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size = "
            f"{config.model.vocab_size}: {_more_rows(config, tokenizer.vocab_size)}"
        )
    summaries: dict[str, list[PrefixSummary]] = {"data.train": [], "data.validation": []}
    notes = []
    for name, blend in (("data.train", data.train), ("data.validation", data.validation)):
        if blend:
            with _named(name):
                summaries[name] = check_blend(blend, tokenizer_digest=tokenizer.digest())
                notes += _repeated_notes(name, blend)
                notes += _check_ids(config, blend, tokenizer.vocab_size, only_plan=only_plan)
    notes += repetition_notes(config, summaries["data.train"])
    if data.validation and not data.allow_shared_validation:
        _refuse_shared(data.train, data.validation)
    train, validation = summaries.values()
    unverified = [summary.prefix for summary in (*train, *validation) if summary.tokenizer_digest is None]
    notes = [*(f"note: {note}" for note in tokenizer.notes), *notes, *_unverified_notes(unverified)]
    notes += vocabulary_notes(data.embedded_corpus, data.tokenizer, config.model.vocab_size)
    return DataSummary(train, validation, tokenizer.vocab_size, notes)


def _more_rows(config: ResolvedConfig, tokens: int) -> str:
    """What to do about a tokenizer with more tokens than the embedding has rows."""
    init_from = config.run.init_from
    if init_from is None and newest_checkpoint(config) is None:
        return f"set model.vocab_size to at least {tokens}"
    if init_from is not None and init_from.startswith(HUGGING_FACE):
        folder = init_from.removeprefix(HUGGING_FACE)
        return (
            f"give the weights more rows with megatron-m1 convert from-hf {folder} OUT --resize-vocab {tokens}, and "
            "start from OUT"
        )
    return (
        "the weights have no more rows; give them some by megatron-m1 convert to-hf, then megatron-m1 convert from-hf "
        f"HF_FOLDER OUT --resize-vocab {tokens}, and start from OUT"
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the field's name before what is wrong with its value."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_ids(config: ResolvedConfig, blend: Sequence[str], vocab_size: int, *, only_plan: bool) -> list[str]:
    """Check that the embedding has a row for every id; return what a plan leaves to the run."""
    cache, notes = Path(config.data.cache_folder), []
    unread = {prefix: unread_bytes([prefix], cache) for prefix in parse_blend(blend)[0]}
    if only_plan and sum(unread.values()) > PLAN_READS_BYTES:
        left = [prefix for prefix, size in unread.items() if size]
        total = sum(unread.values()) / 1e9
        notes = [f"note: the ids of {', '.join(left)} ({total:,.1f} GB) are checked when the run starts"]
        unread = {prefix: 0 for prefix, size in unread.items() if not size}
    check_token_ids(list(unread), vocab_size=vocab_size, cache_folder=cache, remember=not only_plan)
    return notes


def _repeated_notes(name: str, blend: Sequence[str]) -> list[str]:
    return [
        f"note: {name} names {first} again" + (f" as {prefix}" if prefix != first else "") + ": taken as one corpus "
        "with the sum of the weights"
        for prefix, first in repeated_corpora(blend)
    ]


def _unverified_notes(prefixes: Sequence[str]) -> list[str]:
    """Warn of corpora that don't say which tokenizer made them, as other Megatron tools write them."""
    if not prefixes:
        return []
    first = sidecar_path(prefixes[0])
    taken = ", which is something else" if first.exists() else ""
    others = f" (and {len(prefixes) - 1} more)" if prefixes[1:] else ""
    return [
        f"warning: no sidecar {first}{taken}{others}: that data.tokenizer made this corpus can't be checked; "
        "tokenise it again, or make sure"
    ]


def _refuse_shared(train: Sequence[str], validation: Sequence[str]) -> None:
    for held_out, trained in shared_corpora(validation, train):
        same = trained if held_out == trained else f"{trained} (the same or a copy)"
        raise ValueError(
            f"data.validation names {held_out}, and data.train {same}: name held-out corpora, or say "
            "data.allow_shared_validation true"
        )


def check_folders(config: ResolvedConfig) -> None:
    """Check that the run's folder and the index cache can be made and written; nothing is left behind.

    Raises:
        ValueError: one can't be written, the run folder has files that no run wrote, it holds checkpoints and
            ``run.resume`` is false, or its newest one is of a model of another shape.
    """
    run = config.run
    check_writable(f"run.folder = {run.folder}", Path(run.folder))
    check_run_folder(config)
    check_writable(f"data.cache_folder = {config.data.cache_folder}", Path(config.data.cache_folder))
    if config.data.embedded_corpus is not None and find_embedded_corpus(config) is None:
        folder = config.data.embedded_corpus
        check_writable(f"data.embedded_corpus = {folder}", Path(folder))
    if not run.resume and any(Path(run.folder).glob("checkpoints/step_*")):
        raise ValueError(
            f"run.folder = {run.folder} holds checkpoints and run.resume is false: choose another folder, or resume"
        )
    newest = newest_checkpoint(config)
    if newest is not None:
        try:
            saved = load_config(newest / "config.yaml").model
        except ValueError:
            return  # a damaged one is passed over when it is loaded
        check_shape(config.model, saved, newest)


def finished_at(config: ResolvedConfig) -> int | None:
    """Step at which a run has nothing left to train, found without writing anything; None if there is something.

    A newest checkpoint that is damaged, as far as that shows without reading its tensors, is no end: the run goes on
    from the one before.

    Raises:
        ValueError: the checkpoint is of a model of another shape.
    """
    newest = newest_checkpoint(config) if config.run.resume else None
    # That of a run with stages has only the steps that are left in it.
    if newest is None or step_of(newest) < config.train.max_steps:
        return None
    try:
        found = read_checkpoint(newest)
    except ValueError:
        return None
    check_shape(config.model, found.config.model, newest)
    return found.step


def with_own_tokenizer(config: ResolvedConfig, *, note: Callable[[str], None]) -> ResolvedConfig:
    """Let a run whose tokenizer is not there any more read the copy in its own folder.

    Args:
        config: resolved.
        note: called with a line if it does.
    """
    tokenizer, folder = config.data.tokenizer, Path(config.run.folder)
    if not tokenizer or Path(tokenizer).exists() or not (folder / RESOLVED).is_file():
        return config
    try:
        saved = read_saved(folder, folder)
    except ValueError:
        return config  # check_folders says so
    own = saved.became.data.tokenizer
    asked = absolute(saved.asked).data.tokenizer == absolute(config).data.tokenizer
    if not asked or not is_own(own, folder) or not Path(own).exists():
        return config
    note(f"note: data.tokenizer = {tokenizer} is not there: the run's own copy is read, {own}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=own))


def newest_checkpoint(config: ResolvedConfig) -> Path | None:
    """Return the newest complete checkpoint of the run folder, from which the run goes on, if there is one."""
    return next(iter(complete_checkpoints(Path(config.run.folder))), None)


def find_embedded_corpus(config: ResolvedConfig) -> ResolvedConfig | None:
    """Return the configuration that reads ``data.embedded_corpus``, or None when that one has to be built first.

    Raises:
        ValueError: its tokenizer is damaged, or only one of the blends is the run's own.
    """
    data = config.data
    if data.embedded_corpus is None:
        return _with_initial_tokenizer(config)
    check_own_data(data.embedded_corpus, train=data.train, validation=data.validation, tokenizer=data.tokenizer)
    corpus = find_corpus(data.embedded_corpus, vocab_size=config.model.vocab_size)
    return None if corpus is None else _read_from(config, corpus)


def build_embedded_corpus(config: ResolvedConfig, *, note: Callable[[str], None]) -> ResolvedConfig:
    """Build the embedded corpus if ``data.embedded_corpus`` asks for one, and return the configuration that reads it.

    Every process may call this: one builds, the others wait for it, and a finished corpus is only checked.

    Args:
        config: resolved.
        note: shows a line of progress; called in the process that builds.

    Raises:
        ValueError: the folder can't be written, or this Python has too little text.
    """
    folder = config.data.embedded_corpus
    if folder is None:
        return _with_initial_tokenizer(config)
    try:
        corpus = prepare_corpus(folder, vocab_size=config.model.vocab_size, workers=usable_cores(), note=note)
    except OSError as error:
        raise ValueError(f"data.embedded_corpus = {folder} can't be written: {error.strerror or error}") from error
    return _read_from(config, corpus)


def _with_initial_tokenizer(config: ResolvedConfig) -> ResolvedConfig:
    """Take the tokenizer of ``run.init_from`` where ``data.tokenizer`` names none."""
    if config.data.tokenizer or config.run.init_from is None:
        return config
    # It brings torch, which most runs don't need before their workers start.
    from megatron_m1.convert.sources import initial_tokenizer

    place = initial_tokenizer(config)
    if place is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(place.absolute())))


def _read_from(config: ResolvedConfig, corpus: PreparedCorpus) -> ResolvedConfig:
    data = dataclasses.replace(
        config.data,
        train=config.data.train or corpus.train,
        validation=config.data.validation or corpus.validation,
        tokenizer=config.data.tokenizer or str(corpus.tokenizer),
    )
    return dataclasses.replace(config, data=data)
