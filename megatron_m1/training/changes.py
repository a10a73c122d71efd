"""What a start in a run's folder finds: another configuration than its checkpoint's, or nothing left to train."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.portable import absolute
from megatron_m1.config.written import read_saved
from megatron_m1.training.run_tokenizer import is_copy, is_own

STREAM_FIELDS = {
    *("data.train", "data.seq_length", "data.packing", "data.reset_at_documents", "data.max_epochs", "train.seed"),
}
"""Fields that decide which packs come next."""
FREE_FIELDS = {"data.cache_folder", "data.embedded_corpus", "train.max_steps"}
"""Fields that may differ between the parts of a run without being worth a word."""


def changed_fields(saved: Config, now: Config) -> dict[str, str]:
    """Describe the fields of model, mesh, data, optimizer and training that differ, by dotted path."""
    changes = {}
    if saved.run.init_from != now.run.init_from:
        changes["run.init_from"] = (
            f"run.init_from {saved.run.init_from} -> {now.run.init_from}, which is not read again"
        )
    for group in ("model", "parallel", "data", "optimizer", "train"):
        before, after = asdict(getattr(saved, group)), asdict(getattr(now, group))
        for name, value in before.items():
            path = f"{group}.{name}"
            if value != after[name] and path not in FREE_FIELDS:
                changes[path] = f"{path} {value} -> {after[name]}"
    return changes


def changes_since(checkpoint: Path, config: ResolvedConfig) -> dict[str, str]:
    """``changed_fields`` since a checkpoint of the run. A tokenizer that the run has a copy of is the same.

    Raises:
        ValueError: the checkpoint's configuration can't be read.
    """
    folder = Path(config.run.folder)
    saved, now = absolute(read_saved(checkpoint, folder).became), absolute(config)
    if now.data.embedded_corpus is not None:
        # Where it has to be built first, its files are not named yet.
        for name in ("train", "validation", "tokenizer"):
            setattr(now.data, name, getattr(now.data, name) or getattr(saved.data, name))
    own = saved.data.tokenizer
    if is_own(own, folder) and is_copy(Path(own), Path(now.data.tokenizer)):
        saved.data.tokenizer = now.data.tokenizer
    return changed_fields(saved, now)


def stream_lines(changes: dict[str, str]) -> list[str]:
    """A line if other tokens come than would have come, else none."""
    if not STREAM_FIELDS & changes.keys():
        return []
    return [
        "so the data are not the stream that would have come; what was read of a corpus does not come again before the "
        "rest of it"
    ]


def nothing_to_train(step: int, config: ResolvedConfig) -> str:
    """The line for a run that has come to its end before it was started."""
    where, given = f"nothing to train: the run is at step {step}", config.recipe.train.max_steps
    if config.recipe.stages and (given is None or given > step):
        last = config.recipe.stages[-1].name
        return f"{where}, the end of its last stage, {last}; make that longer to go on, or choose another run.folder"
    return f"{where}, train.max_steps is {config.train.max_steps}; raise it to go on, or choose another run.folder"
