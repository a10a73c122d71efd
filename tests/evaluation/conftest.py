"""A short run with two held-out corpora."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.data.corpora.prefix import open_tokens
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.runtime.pool import WorkerPool
from tests.data.corpora import write_corpus
from tests.training import loop_runs
from tests.training.conftest import tiny_corpus

__all__ = ["tiny_corpus"]

PACKS = 3
"""Held-out packs: an odd number, which two data-parallel ranks can't share evenly."""


@dataclass(frozen=True)
class TrainedRun:
    """A run of one process."""

    folder: Path
    validation_loss: float
    corpora: list[str]
    """Prefixes of the held-out corpora."""
    tokenizer: Path


@pytest.fixture(scope="session")
def run(workers: WorkerPool, tiny_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Four layers, 504 ids, packs of 64 tokens, two steps."""
    root = tmp_path_factory.mktemp("evaluation")
    tokens, lengths = open_tokens(tiny_corpus["validation"][0])
    ends = lengths.cumsum().tolist()
    documents = [tokens[end - size : end].tolist() for end, size in zip(ends, lengths.tolist(), strict=True)]
    digest = load_tokenizer(tiny_corpus["tokenizer"]).digest()
    corpora = [
        write_corpus(root / name, part, tokenizer_digest=digest)
        for name, part in (("first", documents[:10]), ("second", documents[10:]))
    ]
    settings = loop_runs.write_settings(
        root / "run.yaml",
        tiny_corpus | {"validation": corpora},
        root / "run",
        ("train.max_steps", 2),
        ("train.eval_samples", PACKS),
        ("run.save_interval", 0),
    )
    (summary,) = workers.run(loop_runs.train, settings, world_size=1, process_group=False)
    return TrainedRun(root / "run", summary["validation_loss"], corpora, Path(tiny_corpus["tokenizer"]))
