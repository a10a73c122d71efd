"""A short run, and two Hugging Face folders of different models with what made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import MiniMaxForCausalLM

from megatron_m1.config import Config
from megatron_m1.config.io import load_config
from megatron_m1.runtime.pool import WorkerPool
from tests.reference.transformers_minimax import build
from tests.training import loop_runs
from tests.training.conftest import tiny_corpus

__all__ = ["tiny_corpus"]

STEPS = 2


@dataclass(frozen=True)
class Reference:
    """A folder as transformers saves it, whole heads rotated, and transformers' own model."""

    folder: Path
    model: MiniMaxForCausalLM


@dataclass(frozen=True)
class TrainedRun:
    """A run of two processes, as it was configured, and its summary."""

    folder: Path
    config: Config
    summary: dict[str, Any]


def _reference(folder: Path, **shape: Any) -> Reference:
    sizes: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=24, rope_theta=1e4, softmax_every=2, alpha=1.7)
    model = build(**sizes, rotary_dim=24, **shape)
    model.save_pretrained(folder)
    return Reference(folder, model)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """4 layers, 99 ids."""
    return _reference(
        tmp_path_factory.mktemp("reference") / "one", layers=4, hidden=48, ffn=40, experts=5, vocab=99, seed=9
    )


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """2 layers of other widths, 77 ids."""
    return _reference(
        tmp_path_factory.mktemp("reference") / "other", layers=2, hidden=32, ffn=24, experts=3, vocab=77, seed=4
    )


@pytest.fixture(scope="session")
def trained(workers: WorkerPool, tiny_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Four layers, 504 ids, two steps on two processes."""
    root = tmp_path_factory.mktemp("library")
    changes = [("train.max_steps", STEPS), ("run.save_interval", 0)]
    settings = loop_runs.write_settings(root / "run.yaml", tiny_corpus, root / "run", *changes)
    workers.run(loop_runs.train, settings, world_size=2, process_group=False)
    summary = json.loads((root / "run" / "summary.json").read_text())
    return TrainedRun(root / "run", load_config(settings), summary)
