"""What a run needs from the file system, checked before any worker starts: data, tokenizer, run folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_m1.checkpoint_contents import check_shape, complete_checkpoints
from megatron_m1.config import Config
from megatron_m1.config_io import load_config
from megatron_m1.data.cores import usable_cores
from megatron_m1.data.corpus import PreparedCorpus, find_corpus, prepare_corpus
from megatron_m1.data.prefix import PrefixSummary, check_blend
from megatron_m1.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class DataSummary:
    """What the checked data hold."""

    train: list[PrefixSummary]
    validation: list[PrefixSummary]
    tokenizer_vocab_size: int

    @property
    def unverified(self) -> list[str]:
        """Prefixes without a sidecar, as other Megatron tools write them: their tokenizer is not known."""
        return [summary.prefix for summary in (*self.train, *self.validation) if summary.tokenizer_digest is None]


def check_data(config: Config) -> DataSummary:
    """Check the tokenizer and every corpus of both blends against each other and against the model's embedding.

    Raises:
        ValueError: with one line that names the file or value and the fix.
    """
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty: name tokenised prefixes, or give data.embedded_corpus a folder")
    if not data.tokenizer:
        raise ValueError("data.tokenizer is empty: name the tokenizer that made data.train")
    try:
        tokenizer = load_tokenizer(data.tokenizer)
    except OSError as error:
        raise ValueError(f"data.tokenizer = {data.tokenizer} can't be read: {error.strerror or error}") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size = "
            f"{config.model.vocab_size}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    digest = tokenizer.digest()
    train = _check_blend("data.train", data.train, digest)
    validation = _check_blend("data.validation", data.validation, digest) if data.validation else []
    return DataSummary(train, validation, tokenizer.vocab_size)


def _check_blend(name: str, blend: Sequence[str], digest: str) -> list[PrefixSummary]:
    try:
        return check_blend(blend, tokenizer_digest=digest)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_folders(config: Config) -> None:
    """Check that the run's folder and the index cache can be made and written; nothing is left behind.

    Raises:
        ValueError: one can't be written, the run folder holds checkpoints and ``run.resume`` is false, or its newest
            one is of a model of another shape.
    """
    run = config.run
    _check_writable("run.folder", Path(run.folder))
    if config.data.cache_folder is not None:
        _check_writable("data.cache_folder", Path(config.data.cache_folder))
    if config.data.embedded_corpus is not None and find_embedded_corpus(config) is None:
        _check_writable("data.embedded_corpus", Path(config.data.embedded_corpus))
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
        check_shape(vars(config.model), vars(saved), newest)


def newest_checkpoint(config: Config) -> Path | None:
    """Return the newest complete checkpoint of the run folder, from which the run goes on, if there is one."""
    return next(reversed(complete_checkpoints(Path(config.run.folder))), None)


def _check_writable(name: str, folder: Path) -> None:
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        # Permission bits don't tell: root ignores them, and a file system may be read-only or full.
        with tempfile.TemporaryDirectory(prefix=".megatron-m1-", dir=existing) as probe:
            Path(probe, "probe").write_bytes(b"probe")
    except OSError as error:
        # Some file systems on which nothing can be made, such as /proc, answer that the folder itself is not there.
        reason = "no file can be made in it" if error.errno == errno.ENOENT else error.strerror
        raise ValueError(f"{name} = {folder} can't be written: {existing}: {reason}; choose another folder") from error


def find_embedded_corpus(config: Config) -> Config | None:
    """Return the configuration that reads ``data.embedded_corpus``, or None when that one has to be built first.

    Raises:
        ValueError: its tokenizer is damaged.
    """
    if config.data.embedded_corpus is None:
        return config
    corpus = find_corpus(config.data.embedded_corpus, vocab_size=config.model.vocab_size)
    return None if corpus is None else _read_from(config, corpus)


def build_embedded_corpus(config: Config, *, note: Callable[[str], None]) -> Config:
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
        return config
    try:
        corpus = prepare_corpus(folder, vocab_size=config.model.vocab_size, workers=usable_cores(), note=note)
    except OSError as error:
        raise ValueError(f"data.embedded_corpus = {folder} can't be written: {error.strerror or error}") from error
    return _read_from(config, corpus)


def _read_from(config: Config, corpus: PreparedCorpus) -> Config:
    data = dataclasses.replace(
        config.data,
        train=config.data.train or corpus.train,
        validation=config.data.validation or corpus.validation,
        tokenizer=config.data.tokenizer or str(corpus.tokenizer),
    )
    return dataclasses.replace(config, data=data)
