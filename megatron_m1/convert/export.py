"""From our checkpoint to a Hugging Face folder, shard by shard."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_m1.checkpoint.folder import first_fault, read_manifest
from megatron_m1.convert.card import CARD, CardFacts, model_card
from megatron_m1.convert.families.minimax_m1.buffers import buffer_entries, buffers_layer, native_buffers
from megatron_m1.convert.families.minimax_m1.config import caveats, hub_config, native_config
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece, cast, check_spelled, to_hub, units
from megatron_m1.convert.hub_folder import open_hub_folder
from megatron_m1.convert.jobs import Job, run_jobs
from megatron_m1.convert.licences import add_licences, licences_of
from megatron_m1.convert.our_checkpoint import OurCheckpoint
from megatron_m1.convert.places import CONFIG, INDEX, REMOTE_FILES, check_remote_code
from megatron_m1.convert.safetensors_files import Entry, StreamedFile, total_size
from megatron_m1.convert.sizes import group_by_size
from megatron_m1.convert.tokenizer import ReadyTokenizer, ready_tokenizer
from megatron_m1.convert.work import Ranks, WorkFolder, stamps
from megatron_m1.data.tokenizers.hf_folder import GENERATION
from megatron_m1.files import read_json_object, write_atomically
from megatron_m1.printing import counted
from megatron_m1.shapes.registry import layer_mixers
from megatron_m1.shapes.softmax import rotary_dim

AUTO_MAP = {
    "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
    "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
}


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    dtype: torch.dtype | None = None
    """Of all weights but the router's, which stays fp32; None keeps each as it is stored."""
    shard_size: int = 10**9
    """Bytes of tensors in a file at most, unless one tensor of ours is larger."""
    format: Literal["hub", "native"] = "hub"
    """hub: names and config keys for transformers, vLLM and the hub's code. native: what transformers itself saves, its
    buffers included, on which vLLM fails, and with partial rotary as ``families.minimax_m1.rotary`` spells it."""
    max_positions: int | None = None
    """max_position_embeddings of config.json; None takes the model's, or the packs' length if that is more."""
    tokenizer: Path | None = None
    """SentencePiece model or Hugging Face tokenizer folder to put beside the weights."""
    remote_code: Path | None = None
    """Folder with the hub's own modeling files, to be copied and named in auto_map."""
    verify: bool = False
    """Read every file again and compare it with the checkpoint, bit by bit."""
    licence: str | None = None
    """The hub's identifier of the model's licence, for the card; None if nobody states one."""


@dataclass(frozen=True)
class _Shard:
    name: str
    units: tuple[WeightPiece, ...]
    entries: tuple[Entry, ...]


class _Plan:
    """Which tensor goes to which shard.

    Raises:
        ValueError: the format has no words for the model.
    """

    def __init__(self, source: OurCheckpoint, options: ExportOptions) -> None:
        self.source = source
        self.options = options
        model = source.model
        check_spelled(model)
        self.native_heads = options.format == "native" and rotary_dim(model) < model.kv_channels
        wanted = units(model, native_heads=self.native_heads)
        groups = group_by_size(wanted, lambda unit: total_size(self.entries(unit)), options.shard_size)
        count = len(groups)
        self.shards = [
            _Shard(
                f"model-{number:05}-of-{count:05}.safetensors",
                tuple(group),
                tuple(entry for unit in group for entry in self.entries(unit)),
            )
            for number, group in enumerate(groups, start=1)
        ]
        self.total = sum(total_size(shard.entries) for shard in self.shards)

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says."""
        return self.options.dtype or self.source.stored_dtype(self.source.units[0])

    def dtype_of(self, unit: WeightPiece) -> torch.dtype:
        """What a unit is written as."""
        return unit.dtype(self.options.dtype or self.source.stored_dtype(unit))

    def _buffers_layer(self, unit: WeightPiece) -> int | None:
        """Layer whose buffers follow this unit, if any do."""
        return buffers_layer(unit) if self.options.format == "native" else None

    def entries(self, unit: WeightPiece) -> list[Entry]:
        """Tensors that are written for a unit."""
        written = [Entry(part.name, self.dtype_of(unit), part.shape) for part in unit.parts]
        layer = self._buffers_layer(unit)
        return written if layer is None else [*written, *buffer_entries(self.source.model, layer, self.dtype)]

    def tensors(self, unit: WeightPiece) -> Iterator[Tensor]:
        """The same, with their numbers."""
        ours = self.source.read(unit)
        dtype = self.dtype_of(unit)
        for piece in to_hub(unit, ours):
            yield cast(unit, piece, dtype)
        layer = self._buffers_layer(unit)
        if layer is not None:
            yield from native_buffers(self.source.model, layer, self.dtype)


def _write(plan: _Plan, folder: Path, shard: _Shard) -> None:
    with StreamedFile(folder / shard.name, shard.entries) as file:
        for unit in shard.units:
            for tensor in plan.tensors(unit):
                file.add(tensor)


def _check(plan: _Plan, folder: Path, shard: _Shard) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(folder / shard.name, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{folder / shard.name} is not what was written: check the disk ({error})") from error
    with file:
        for unit in shard.units:
            for entry, tensor in zip(plan.entries(unit), plan.tensors(unit), strict=True):
                if not same_bits(file.get_tensor(entry.name), tensor):
                    raise ValueError(f"{folder / shard.name}: {entry.name} is not what was written: check the disk")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaNs compare by their bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # [...] -> bytes
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def source_fault(folder: Path, ranks: Ranks) -> Callable[[Event], str | None]:
    """Return what checks this rank's share of a folder's files against its integrity.json, until it is told to end."""

    def check(over: Event) -> str | None:
        try:
            files = read_manifest(folder)
        except ValueError as error:
            return f"{folder} is damaged: {error}"
        for name, digest in list(files.items())[ranks.rank :: ranks.size]:
            # Of a large model this takes many minutes, for which a full disk or Ctrl-C should not wait.
            fault = None if over.is_set() else first_fault(folder, {name: digest})
            if fault is not None:
                return f"{folder} is damaged: {fault}"
        return None

    return check


def _finish(plan: _Plan, folder: Path, tokenizer: ReadyTokenizer | None) -> None:
    """Write all that is no weight; the index last."""
    options, contents = plan.options, plan.source.contents
    build = native_config if options.format == "native" else hub_config
    model, seq_length = contents.config.model, contents.config.data.seq_length
    config = build(model, plan.dtype, options.max_positions or max(seq_length, model.max_position_embeddings or 0))
    generation: dict[str, Any] = {"do_sample": False}
    brought = False
    if tokenizer is not None:
        ids, own = tokenizer.write(folder), tokenizer.source / GENERATION
        # An imported model's own settings have travelled with its tokenizer, and stay as they are.
        brought = own.is_file()
        generation = ids | (read_json_object(own) if brought else generation)
        config |= ids | {"bos_token_id": generation.get("bos_token_id")}
    if options.remote_code is not None:
        for name in REMOTE_FILES:
            shutil.copyfile(options.remote_code / name, folder / name)
        config["auto_map"] = AUTO_MAP
    _write_json(folder / CONFIG, config)
    _write_card(plan, folder, tokenizer)
    if not brought:
        _write_json(folder / GENERATION, generation)
    index = {
        "metadata": {"total_size": plan.total},
        "weight_map": {entry.name: shard.name for shard in plan.shards for entry in shard.entries},
    }
    _write_json(folder / INDEX, index)


def _write_card(plan: _Plan, folder: Path, tokenizer: ReadyTokenizer | None) -> None:
    options, contents = plan.options, plan.source.contents
    native = options.format == "native"
    facts = CardFacts(
        dtype=str(plan.dtype).removeprefix("torch."),
        licence=options.licence,
        licence_files=add_licences(licences_of(contents.folder), folder),
        tokenizer=None if tokenizer is None else tokenizer.description,
        remote_code=options.remote_code is not None,
        caveats=caveats(contents.config.model, native=native),
    )
    write_atomically(folder / CARD, model_card(contents.folder, contents.became, facts).encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def describe_export(source: OurCheckpoint, options: ExportOptions) -> str:
    """One line: what an export will write."""
    plan = _Plan(source, options)
    count = sum(len(shard.entries) for shard in plan.shards)
    mixers = Counter(layer_mixers(source.model))
    return (
        f"{count:,} tensors, {plan.total:,} bytes in {counted(len(plan.shards), 'file')}, "
        f"{' and '.join(f'{layers} {kind}' for kind, layers in mixers.items())} layers, "
        f"{str(plan.dtype).removeprefix('torch.')}"
    )


def check_inputs(source: OurCheckpoint, options: ExportOptions) -> ReadyTokenizer | None:
    """Check what an export reads besides the checkpoint, and return the tokenizer.

    Raises:
        ValueError: the tokenizer can't be exported, modeling files are missing, or the format is not theirs.
    """
    if options.remote_code is not None:
        check_remote_code(options.remote_code, options.format)
    place = options.tokenizer
    return None if place is None else ready_tokenizer(place, source.model.vocab_size)


def export(source: OurCheckpoint, out: Path, options: ExportOptions, ranks: Ranks) -> tuple[str, ...]:
    """Write ``out``. Collective over ``ranks``; memory is that of the largest unit, a few times.

    Returns:
        What was assumed of the tokenizer, one line each.

    Raises:
        ConversionError: the disk refuses, or the checkpoint is damaged; ``out`` is not there.
        ValueError: ``out`` exists, can't be made or lies in the checkpoint, or as ``check_inputs``.
    """
    if out.resolve().is_relative_to(source.folder.resolve()):
        raise ValueError(f"{out} lies in the checkpoint {source.folder} and would go with it: choose another OUT")
    tokenizer = check_inputs(source, options)
    plan = _Plan(source, options)
    others = [path for path in (options.tokenizer, options.remote_code) if path is not None]
    with WorkFolder(out, _description(plan), ranks, reads=[source.folder, *others]) as work:

        def job(shard: _Shard) -> Job:
            return Job(
                work.path / shard.name,
                total_size(shard.entries),
                write=lambda: _write(plan, work.path, shard),
                check=(lambda: _check(plan, work.path, shard)) if options.verify else None,
            )

        jobs: Sequence[Job] = [job(shard) for shard in plan.shards]
        run_jobs(work, jobs, ranks, title="to-hf", beside=source_fault(source.folder, ranks))

        def finish() -> None:
            work.keep_only([shard.name for shard in plan.shards])
            _finish(plan, work.path, tokenizer)
            if options.format == "hub":
                open_hub_folder(work.path)

        work.commit(finish)
    return () if tokenizer is None else tokenizer.notes


def _description(plan: _Plan) -> dict[str, Any]:
    options = plan.options
    return {
        "from": str(plan.source.folder.resolve()),
        "files": stamps(plan.source.folder),
        "dtype": str(options.dtype),
        "shard_size": options.shard_size,
        "format": options.format,
        "native_heads": plan.native_heads,
    }
