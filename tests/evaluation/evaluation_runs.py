"""What tests of evaluation run on worker processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_m1.evaluation.model import open_model
from megatron_m1.evaluation.plan import find_target, settle
from megatron_m1.evaluation.sequences import Scored, score
from megatron_m1.runtime import mesh
from tests.training import loop_runs


def evaluate(rank: int, world_size: int, words: list[str], cache: Path | None = None) -> tuple[int, str]:
    """Run the console command as one of torchrun's workers, without a network; its status and what it prints."""
    if cache is not None:
        os.environ |= {"HF_HOME": str(cache), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return loop_runs.command(rank, world_size, ["evaluate", *words])


def refusal(rank: int, world_size: int, words: list[str], cache: Path) -> str:
    """The line with which every rank ends."""
    try:
        evaluate(rank, world_size, words, cache)
    except ValueError as error:
        return str(error)
    return "evaluated"


def record(folder: Path, kind: str) -> dict[str, Any]:
    """What an evaluation has written."""
    content: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text())
    return content


def scored(
    rank: int, world_size: int, run: Path, flags: list[str], sequences: list[Scored], output: Path
) -> dict[str, Any]:
    """Losses, hits and choices of sequences, and what a loaded model holds besides its parameters."""
    target = find_target(run, flags, options=[], output=output)
    config = settle(target, world_size, has_gpu=False)
    grid = mesh.initialise(config.parallel, seed=1)
    model = open_model(config, grid, target.place.folder, lambda: None)
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    done: list[int] = []
    sums = score(model, sequences, done.append)
    return {
        "loss": sums.loss.tolist(),
        "tokens": sums.tokens.tolist(),
        "hits": sums.hits.tolist(),
        "chosen": sums.chosen.tolist(),
        "done": sum(done),
        "trains": [hasattr(p, "main_grad") or p.requires_grad or p.grad is not None for p in parameters],
        "dtypes": {str(p.dtype) for p in parameters if p.dtype != torch.float32},
    }
