"""Checkpoints that several tests of conversion start from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.runtime.pool import WorkerPool
from tests.convert import runs
from tests.convert.folders import convert
from tests.convert.killed import SHARD
from tests.reference.transformers_minimax import build


@dataclass(frozen=True)
class Run:
    """A run folder with one checkpoint, and its parameters' hashes by rank."""

    folder: Path
    prints: list[dict[str, str]]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "step_00000001"


@pytest.fixture(scope="session")
def fp32_run(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """fp32 weights written by TP2 x PP2 x EP2."""
    folder = tmp_path_factory.mktemp("fp32")
    prints = workers.run(runs.train_and_save, runs.config_of(runs.MESH), folder, world_size=runs.MESH_SIZE)
    return Run(folder, prints)


@pytest.fixture(scope="session")
def bf16_run(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """bf16 weights written by TP2 x PP2 x EP2, router and head fp32."""
    folder = tmp_path_factory.mktemp("bf16")
    prints = workers.run(runs.train_and_save, runs.config_of(runs.MESH, "bf16"), folder, world_size=runs.MESH_SIZE)
    return Run(folder, prints)


@pytest.fixture(scope="session")
def full_rotary_run(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """fp32 weights of one process, whole heads rotated: what native transformers computes."""
    folder = tmp_path_factory.mktemp("rotary")
    config = runs.config_of({}, rotary_percent=1.0)
    return Run(folder, workers.run(runs.train_and_save, config, folder, world_size=1))


@pytest.fixture
def checkpoint(fp32_run: Run, tmp_path: Path) -> Path:
    """A copy of a run's checkpoint, alone in a run folder."""
    target = tmp_path / "run" / "checkpoints" / fp32_run.checkpoint.name
    shutil.copytree(fp32_run.checkpoint, target)
    return target


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder of several shards, and what it was made of: a checkpoint, and a folder of transformers'."""
    root = tmp_path_factory.mktemp("hub")
    shape: dict[str, Any] = dict(layers=8, hidden=48, heads=4, kv_heads=2, head_dim=24, ffn=40, experts=5)
    model = build(**shape, vocab=99, rotary_dim=24, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    model.save_pretrained(root / "native")
    convert("from-hf", root / "native", root / "ours")
    convert("to-hf", root / "ours", root / "hub", "--shard-size", f"{SHARD}")
    return root
