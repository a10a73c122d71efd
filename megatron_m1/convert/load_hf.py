"""From a Hugging Face folder to a checkpoint of ours, file by file; any mesh reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m1.checkpoint import folder as folders
from megatron_m1.checkpoint.contents import FORMAT
from megatron_m1.config import Config
from megatron_m1.config.written import config_text
from megatron_m1.convert.export import same_bits
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece, cast
from megatron_m1.convert.hub_folder import HubFolder
from megatron_m1.convert.jobs import Job, run_jobs
from megatron_m1.convert.licences import LICENCES, keep_licences
from megatron_m1.convert.our_checkpoint import LateWriter, open_checkpoint
from megatron_m1.convert.resize import Resize, ResizedFolder, resized
from megatron_m1.convert.sizes import group_by_size
from megatron_m1.convert.tokenizer import TOKENIZER, copy_tokenizer
from megatron_m1.convert.work import ConversionError, Ranks, WorkFolder, stamps

CHECKPOINT = Path("checkpoints") / folders.folder_name(0)
"""Where in ``OUT`` the checkpoint is: ``OUT`` looks like a run that has not trained yet."""


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is written."""

    dtype: torch.dtype | None = None
    """Of all weights but the router's, which is fp32; None keeps each as it is stored."""
    shard_size: int = 5 * 10**8
    """Bytes of tensors in a file at most, unless one tensor of ours is larger."""
    verify: bool = False
    """Read the whole checkpoint again and compare it with the folder, bit by bit."""
    resize: Resize | None = None
    """More rows for embedding and head; None keeps them as they are."""


@contextmanager
def _without_crc() -> Iterator[None]:
    # torch.save's checksum takes most of its time, and integrity.json has a better one.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Loading:
    """One import."""

    def __init__(self, source: HubFolder, work: WorkFolder, options: LoadOptions) -> None:
        self.source = source
        self.source_files = stamps(source.folder)
        self.options = options
        self.work = work
        self.folder = self.work.path / CHECKPOINT
        sizes = {unit: unit.numel * self.dtype(unit).itemsize for unit in source.units}
        self.groups = group_by_size(source.units, lambda unit: sizes[unit], options.shard_size)
        self.sizes = [sum(sizes[unit] for unit in group) for group in self.groups]
        self.writer = LateWriter(self.folder, self.groups, self.dtype, self.resolve)

    def dtype(self, unit: WeightPiece) -> torch.dtype:
        return unit.dtype(self.options.dtype or self.source.stored_dtype(unit))

    def resolve(self, unit: WeightPiece) -> Tensor:
        read = cast(unit, self.source.read(unit), self.dtype(unit))
        # The file's pages must not be handed on: the writer empties what it is given.
        return read.clone() if len(unit.parts) == 1 and read.dtype == self.source.stored_dtype(unit) else read

    def write(self, number: int) -> list[list[int]]:
        with _without_crc():
            results = self.writer.write(number)
        places = {result.index: result.storage_data for result in results}
        return [[places[item.index].offset, places[item.index].length] for item in self.writer.items(number)]

    def jobs(self) -> list[Job]:
        return [
            Job(self.folder / self.writer.name(number), size, write=partial(self.write, number))
            for number, size in enumerate(self.sizes)
        ]

    def results(self, number: int, places: list[list[int]]) -> list[WriteResult]:
        name = self.writer.name(number)
        if any(type(place) is not int for pair in places for place in pair):
            raise TypeError("no place in a file")
        return [
            WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))
            for item, (offset, length) in zip(self.writer.items(number), places, strict=True)
        ]

    def config(self) -> Config:
        dtype = self.options.dtype or self.source.dtype
        config = Config(model=self.source.model)
        config.train.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        config.data.seq_length = min(config.data.seq_length, config.model.max_position_embeddings or 1 << 62)
        return config

    def finish(self, entries: list[dict[str, Any]]) -> None:
        # Nothing in a Hugging Face folder says what its weights should be: some could be the old ones, some the new.
        if stamps(self.source.folder) != self.source_files:
            raise ValueError(f"{self.source.folder} has changed while it was read: run again, it begins anew")
        try:
            results = [self.results(number, entry["value"]) for number, entry in enumerate(entries)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.work.path} has a damaged journal: remove it and run again") from error
        self.writer.finish(results)
        config = self.config()
        tokenizer = self.work.path / TOKENIZER
        if copy_tokenizer(self.source.folder, tokenizer):
            config.data.tokenizer = str((self.work.out / TOKENIZER).absolute())
        keep_licences(self.source.folder, self.work.path / LICENCES)
        state: dict[str, Any] = {"step": 0, "tokens": 0, "consumed_samples": 0, "weights_only": True}
        state |= {"source": str(self.source.folder.resolve()), "source_files": self.source_files}
        if isinstance(self.source, ResizedFolder):
            state["resized_from"] = self.source.stored_rows
        texts = {
            folders.CONFIG: config_text(config),
            folders.STATE: json.dumps(state, indent=2) + "\n",
            folders.COMMIT_MARK: json.dumps(FORMAT),
        }
        digests = {self.writer.name(number): entry["after"] for number, entry in enumerate(entries)}
        folders.seal(self.folder, texts, digests)
        folders.move_tracker(self.folder)


def _first_difference(loading: _Loading, ranks: Ranks) -> str | None:
    written = open_checkpoint(loading.folder)
    for unit in loading.source.units[ranks.rank :: ranks.size]:
        if not same_bits(written.read(unit), cast(unit, loading.source.read(unit), loading.dtype(unit))):
            return f"{loading.folder}: {unit.ours} is not what was written: check the disk"
    return None


def _verify(loading: _Loading, ranks: Ranks) -> None:
    try:
        fault = _first_difference(loading, ranks)
    except ValueError as error:
        fault = str(error)
    faults = [other for other in ranks.gather(fault) if other is not None]
    if faults:
        loading.work.forget()
        raise ConversionError(faults[0])


def load_hf(source: HubFolder, out: Path, options: LoadOptions, ranks: Ranks) -> Path:
    """Write ``out``, a folder like a run's with one checkpoint of step 0. Collective over ``ranks``.

    Memory is that of the largest unit, a few times.

    Returns:
        The checkpoint.

    Raises:
        ConversionError: the disk refuses, or a file of the source can't be read; ``out`` is not there.
        ValueError: ``out`` exists, the source has changed meanwhile, or has more rows than are wanted.
    """
    description = _description(source, options)
    if options.resize is not None:
        source = resized(source, options.resize)
    with WorkFolder(out, description, ranks, reads=[source.folder]) as work:
        loading = _Loading(source, work, options)

        def digest(name: str) -> str:
            return folders.file_digests(loading.folder, [name])[name]

        entries = run_jobs(work, loading.jobs(), ranks, title="from-hf", beside=lambda _: None, after=digest)
        work.on_first(lambda: loading.finish(entries))
        if options.verify:
            _verify(loading, ranks)
        work.commit(lambda: None)
    return out / CHECKPOINT


def _description(source: HubFolder, options: LoadOptions) -> dict[str, Any]:
    return {
        "from": str(source.folder.resolve()),
        "files": stamps(source.folder),
        "dtype": str(options.dtype),
        "shard_size": options.shard_size,
        "resize": str(options.resize),
    }
