"""What tests of the library run on worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

import megatron_m1
from megatron_m1.config import Config
from megatron_m1.training.step import train_step
from tests.model.meshes import my_share, packs, run_config, start
from tests.training import loop_runs

QUESTION = [3, 1, 4, 1, 5, 9, 2, 6]


def losses_around_a_question(rank: int, world_size: int, config: Config, path: Path | None) -> tuple[list[float], Any]:
    """Train three steps; before and between them ask a model of another shape, and look at the run's own groups."""
    trained = start(config, world_size)
    groups = parallel_state.get_tensor_model_parallel_group()
    model = megatron_m1.load(path) if path is not None else None
    losses, answers = [], []
    for step in range(3):
        if model is not None:
            answers.append(model.logits(QUESTION))
            model.loss(QUESTION)
            model.generate(QUESTION, max_tokens=2)
        losses.append(train_step(trained, my_share(trained, packs(step)), lr=3e-3).loss)
    assert parallel_state.get_tensor_model_parallel_group() is groups and groups.size() == 2
    assert dist.get_world_size() == world_size
    return losses, answers


def answers_around_a_run(rank: int, world_size: int, path: Path, settings: Path) -> list[Tensor]:
    """Ask a model, train a run from its start to its end in this process, and ask the model and a new one again."""
    model = megatron_m1.load(path)
    answers = [model.logits(QUESTION)]
    loop_runs.train(rank, world_size, settings)
    assert not dist.is_initialized()
    return [*answers, model.logits(QUESTION), megatron_m1.load(path).logits(QUESTION)]


def meshed_config() -> Config:
    """A run that splits its matrices and experts over two processes."""
    return run_config({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2})
