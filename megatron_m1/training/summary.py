"""The end of a run in a few lines: how far it came, and how its held-out loss compares with n-gram models."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_m1.config import Config
from megatron_m1.data.entropy import ngram_entropy
from megatron_m1.training.feed import Feed


def summarise(
    config: Config, feed: Feed, progress: dict[str, int], validation_loss: float | None, interrupted: str | None
) -> dict[str, Any]:
    """Collect the summary.

    Args:
        config: resolved.
        feed: its held-out packs are what unigram and bigram models of the training data are scored on.
        progress: step, tokens, skipped steps.
        validation_loss: held-out loss in nats per token, None when it was not measured.
        interrupted: name of the signal that ended the run, None when it came to its end.

    Returns:
        JSON-able record; losses and entropies in nats per token.
    """
    summary: dict[str, Any] = {
        "run_folder": config.run.folder,
        "step": progress["step"],
        "tokens": progress["tokens"],
        "skipped_steps": progress["skipped_total"],
        "interrupted": interrupted,
        "validation_loss": validation_loss,
    }
    if validation_loss is not None and feed.held_out is not None:
        packs = [feed.held_out[index] for index in range(len(feed.held_out))]
        entropy = ngram_entropy(config.data.train, packs, vocab_size=config.model.vocab_size)
        summary |= {
            "unigram_entropy": entropy.unigram,
            "bigram_entropy": entropy.bigram,
            "below_unigram": entropy.unigram - validation_loss,
        }
    return summary


def show_summary(summary: dict[str, Any]) -> None:
    """Print ``summary`` as a table on standard output."""
    table = Table(title="run", show_header=False)
    units = {"validation_loss": "nat/token", "unigram_entropy": "nat/token", "bigram_entropy": "nat/token"}
    for name, value in summary.items():
        if value is None:
            continue
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), f"{shown} {units.get(name, '')}".rstrip())
    Console().print(table)
