"""The end of a run in a few lines: how far it came, and how its held-out loss compares with n-gram models."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import distributed as dist

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.config import ResolvedConfig
from megatron_m1.evaluation.ngrams import ngram_entropy
from megatron_m1.training.description import Fact, lines_of
from megatron_m1.training.feed import Feed
from megatron_m1.training.progress import Progress
from megatron_m1.training.run_folder import METRICS


def summarise(
    config: ResolvedConfig, feed: Feed, progress: Progress, validation_loss: float | None, interrupted: str | None
) -> dict[str, Any]:
    """Collect the summary. Collective: rank 0 counts the n-grams for all.

    Args:
        config: resolved.
        feed: its held-out packs are what unigram and bigram models of the training data are scored on.
        progress: of the run, at its end.
        validation_loss: held-out loss in nats per token, None when it was not measured.
        interrupted: name of the signal that ended the run, None when it came to its end.

    Returns:
        JSON-able record; losses and entropies in nats per token.
    """
    summary: dict[str, Any] = {
        "run_folder": config.run.folder,
        "step": progress.step,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped_total,
        "spikes": progress.spike_guard.get("total", 0),
        "interrupted": interrupted,
        "validation_loss": validation_loss,
    }
    if validation_loss is not None:
        found: list[Any] = [_baselines(config, feed, validation_loss) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        summary |= found[0]
    return summary


def _baselines(config: ResolvedConfig, feed: Feed, validation_loss: float) -> dict[str, Any]:
    assert feed.held_out is not None
    packs = [feed.held_out[index] for index in range(len(feed.held_out))]
    try:
        entropy = ngram_entropy(config.data.train, packs, vocab_size=config.model.vocab_size)
    except ValueError as error:
        # The run is done and its checkpoint saved: corpora too odd to count don't make it fail.
        return {"baselines": f"none: {error}"}
    return {
        "unigram_entropy": entropy.unigram,
        "bigram_entropy": entropy.bigram,
        "below_unigram": entropy.unigram - validation_loss,
    }


def where_to_look(folder: Path) -> list[str]:
    """Lines that say where a run has left what, and the commands that show it, to be pasted.

    Args:
        folder: the run's. What is not there is not named.
    """
    facts: list[Fact] = []
    if any(folder.glob("tensorboard/*")):
        facts.append(("tensorboard", f"{_program('tensorboard')} --logdir {shlex.quote(str(folder / 'tensorboard'))}"))
    if any(folder.glob("profile/*.json")):
        facts.append(("profile", str(folder / "profile")))
    if (folder / METRICS).exists():
        facts.append(("metrics", str(folder / METRICS)))
    checkpoints = complete_checkpoints(folder)
    if checkpoints:
        command = f"{_program('megatron-m1')} generate {shlex.quote(str(folder))} --prompt 'The'"
        facts += [("checkpoint", str(checkpoints[0])), ("generate", command)]
    return lines_of(facts)


def _program(name: str) -> str:
    """A program of this Python's environment, as a shell in this directory finds it."""
    # Not resolved: in an environment of its own, Python itself is a link to another one.
    path = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not path.exists() or (found is not None and path.samefile(found)):
        return name
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def show_summary(summary: dict[str, Any]) -> None:
    """Print ``summary`` as a table on standard output; spikes only if there were some."""
    table = Table(title="run", show_header=False)
    losses = ("validation_loss", "unigram_entropy", "bigram_entropy", "below_unigram")
    units = dict.fromkeys(losses, "nat/token")
    for name, value in summary.items():
        # One number a rank may be thousands: the file has them.
        if value is None or isinstance(value, list) or (name == "spikes" and not value):
            continue
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), f"{shown} {units.get(name, '')}".rstrip())
    Console().print(table)
