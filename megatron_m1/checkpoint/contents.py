"""What lies in a checkpoint folder, read from its metadata: no tensor is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_m1.checkpoint.folder import (
    COMMIT_MARK,
    DATA_SUFFIX,
    MANIFEST,
    TOKENIZER,
    checkpoint_folders,
    first_fault,
    read_manifest,
    read_state,
    run_folder_of,
)
from megatron_m1.checkpoint.metadata_file import tensors_of
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.written import read_saved
from megatron_m1.files import check_folder, read_json_object
from megatron_m1.plan.parameters import model_counts
from megatron_m1.printing import shown
from megatron_m1.shapes.registry import layer_ffns, layer_mixers

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""What is in ``metadata.json``."""
OPTIMIZER_PREFIX = "optimizer."
"""What the optimizer's tensors begin with."""

EXPERT_BIAS = "router.expert_bias"
"""What the names of tensors end with that are no parameters."""

MODEL_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_query_groups",
    "residual",
    "moe_ffn_hidden_size",
    "num_moe_experts",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "vocab_size",
)
"""Fields of ``model`` that a checkpoint and the run that continues it must share, besides the kinds of its layers."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as all ranks together hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint's configuration, its place in the run, and its tensors."""

    folder: Path
    config: Config
    """What was asked; ``auto`` and none are left open."""
    became: Config
    """What that became where the checkpoint was written. Both have paths that can be opened from here."""
    step: int
    tensors: list[StoredTensor]
    bytes_on_disk: int

    @property
    def tokens(self) -> int:
        """Tokens trained on up to this checkpoint; where it does not say, as if every step was as its configuration."""
        try:
            tokens = read_state(self.folder).get("tokens")
        except ValueError:
            tokens = None
        return tokens if type(tokens) is int else self.step * self.config.tokens_per_step

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer is: the run's own copy, or else where it was. None if nothing names one."""
        recorded = [Path(path) for path in (self.became.data.tokenizer, self.config.data.tokenizer) if path]
        if not recorded:
            return None
        # An imported model that was moved has it beside itself, and says where that once was.
        beside = run_folder_of(self.folder) / TOKENIZER
        places = [recorded[0], *([beside] if beside.is_dir() else []), *recorded]
        return next((place for place in places if place.exists()), recorded[0])


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoints of a run whose save came to its end, newest first."""
    return [folder for folder in checkpoint_folders(run_folder / "checkpoints") if (folder / COMMIT_MARK).is_file()]


def check_shape(
    wanted: ModelConfig,
    saved: ModelConfig,
    checkpoint: Path,
    *,
    fix: str = "restore it, or give another run.folder",
) -> None:
    """Check that a model can take a checkpoint's tensors.

    Args:
        wanted: the model of this run.
        saved: that of the checkpoint's configuration.
        checkpoint: its folder, for the message.
        fix: what the user can do, for the message.

    Raises:
        ValueError: one of ``MODEL_SHAPE`` differs, or the kind of a layer.
    """
    for name in MODEL_SHAPE:
        ours, theirs = getattr(wanted, name), getattr(saved, name)
        if ours != theirs:
            rows = name == "vocab_size" and ours > theirs
            more = f"; megatron-m1 convert from-hf HF_FOLDER OUT --resize-vocab {ours} makes more rows" if rows else ""
            raise ValueError(f"model.{name} is {ours}, but checkpoint {checkpoint} has {theirs}: {fix}{more}")
    for name, kinds in (("mixers", layer_mixers), ("ffns", layer_ffns)):
        for layer, (ours, theirs) in enumerate(zip(kinds(wanted), kinds(saved), strict=True)):
            if ours != theirs:
                raise ValueError(
                    f"model.{name} makes layer {layer} {ours}, but in checkpoint {checkpoint} it is {theirs}: {fix}"
                )


def read_checkpoint(folder: Path, *, with_tensors: bool = True) -> CheckpointContents:
    """Read what a checkpoint holds, and check that every file is there and as long as the metadata say.

    Args:
        folder: ``<run.folder>/checkpoints/step_<number>``.
        with_tensors: list the tensors and check their files; False leaves them out, and needs no torch.

    Raises:
        ValueError: it is no checkpoint, is incomplete, or is damaged; one line.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is no folder")
    match = re.fullmatch(r"step_(\d+)", folder.resolve().name)
    if match is None:
        raise ValueError(f"{folder} is no checkpoint: its name must be step_<number>")
    if not (folder / COMMIT_MARK).is_file():
        raise ValueError(f"checkpoint {folder} is incomplete: {COMMIT_MARK} is missing, the save did not finish")
    check_folder(folder)
    _check_small_files(folder)
    check_format(folder)
    tensors = _stored_tensors(folder) if with_tensors else []
    saved = read_saved(folder, run_folder_of(folder))
    return CheckpointContents(
        folder=folder,
        config=saved.asked,
        became=saved.became,
        step=int(match[1]),
        tensors=tensors,
        bytes_on_disk=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def check_format(folder: Path) -> None:
    """Check that ``metadata.json``, which megatron-core reads, names the format that it and we write.

    Raises:
        ValueError: it names another, or can't be read; one line.
    """
    try:
        found = read_json_object(folder / COMMIT_MARK)
    except OSError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {COMMIT_MARK} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    for key, value in FORMAT.items():
        if found.get(key) != value:
            raise ValueError(
                f"checkpoint {folder} is of another format: {COMMIT_MARK} has {key} = {shown(found.get(key))}, not "
                f"{value!r}"
            )


def _check_small_files(folder: Path) -> None:
    """Compare all files but the tensors' with their hashes, before anything in them is believed.

    The tensors' are compared by those who read them: of a large model that takes many minutes.
    """
    if not (folder / MANIFEST).exists():
        return  # old checkpoints can be looked at without; loading one insists on the manifest
    try:
        expected = read_manifest(folder)
    except ValueError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    fault = first_fault(folder, {name: digest for name, digest in expected.items() if not name.endswith(DATA_SUFFIX)})
    if fault is not None:
        raise ValueError(f"checkpoint {folder} is damaged: {fault}")


def _stored_tensors(folder: Path) -> list[StoredTensor]:
    tensors = []
    for name, stored in tensors_of(folder).items():
        dtype = stored.properties.dtype
        tensors.append(StoredTensor(name, stored.size, dtype.name, math.prod(stored.size) * dtype.itemsize))
    return tensors


def check_model_size(contents: CheckpointContents) -> None:
    """Refuse a configuration of another size than the tensors: before a model of that size is made.

    Raises:
        ValueError: they differ, or it has kinds of layers that are not known; one line.
    """
    model, tensors = contents.config.model, contents.tensors
    parameters = [t for t in tensors if not t.name.startswith(OPTIMIZER_PREFIX) and not t.name.endswith(EXPERT_BIAS)]
    held = sum(math.prod(t.shape) for t in parameters)
    try:
        # Counting goes layer by layer: a damaged configuration with a trillion of them would never end.
        described = model_counts(model).total if 0 < model.num_layers <= len(tensors) else None
    except ValueError as error:
        raise ValueError(f"checkpoint {contents.folder} has another model than this program's: {error}") from error
    if described != held:
        raise ValueError(
            f"checkpoint {contents.folder} is damaged: its tensors have {held:,} parameters, "
            + "the model of its config.yaml "
            + ("more layers than there are tensors" if described is None else f"{described:,}")
        )
