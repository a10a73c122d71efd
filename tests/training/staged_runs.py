"""Runs of several stages, small enough to be trained many times."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_m1.training.loop import pretrain
from tests.training import loop_runs as runs
from tests.training.loop_runs import Setting

type Stage = dict[str, Any]


def recipe(more: str, web: str) -> list[Stage]:
    """Three stages of 4, 6 and 2 steps: another length, rotary base, head, blend and batch; then packing and rate."""
    long = {
        "data": {"seq_length": 128, "train": ["0.5", web, "0.5", more], "train_transition_tokens": 1000},
        "model": {"rotary_base": 5.0e4, "lm_head_precision": "bf16"},
        "train": {"global_batch_size_schedule": [0, 2, 1000, 4]},
    }
    end = {"data": {"packing": "best_fit"}, "optimizer": {"lr_segments": ["linear", "1000", "1e-3"]}}
    return [
        {"name": "short", "tokens": 1000},
        {"name": "long", "tokens": 2000, **long},
        {"name": "end", "tokens": 1000, **end},
    ]


def write_recipe(path: Path, corpus: dict[str, Any], folder: Path, stages: Sequence[Stage], *settings: Setting) -> Path:
    """Write the YAML of a run in ``folder`` with these stages."""
    runs.write_settings(path, corpus, folder, ("train.max_steps", None), ("train.eval_interval", 4), *settings)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"stages": list(stages)}))
    return path


def train_until_killed_at(rank: int, world_size: int, settings: Path, sign: str) -> None:
    """Die of SIGKILL as soon as a file or folder is there in the run's folder, or a number of steps is recorded."""
    config = runs.config_of(settings, world_size)
    folder = Path(config.run.folder)

    def is_time() -> bool:
        return runs.steps_recorded(folder) >= int(sign) if sign.isdecimal() else (folder / sign).exists()

    with runs.once(is_time, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        pretrain(config)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [line for line in runs.records(folder) if "loss" in line]
