"""Continued pre-training from end to end: a released-format folder in, a recipe of stages, a folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

import megatron_m1
from megatron_m1.runtime.pool import WorkerPool
from tests.convert.folders import convert
from tests.convert.test_init_from import LOSS_TOLERANCE, SHAPE, VOCAB, pretrain
from tests.convert.test_transformers import load
from tests.reference.transformers_minimax import build
from tests.training.conftest import tiny_corpus  # noqa: F401
from tests.training.loop_runs import records

STAGES: list[dict[str, Any]] = [
    {"name": "continued", "tokens": 2560, "optimizer": {"lr": 3e-3}},
    {
        "name": "longer",
        "tokens": 2304,
        "data": {"seq_length": 96, "packing": "best_fit"},
        "model": {"rotary_base": 100_000.0},
        "optimizer": {"lr": 3e-3, "lr_segments": ["linear", "2304", "3e-4"]},
    },
]
SHORT, LONG = 10, 6
"""Steps of the stages, 4 packs each."""


def test_the_loss_that_was_reported_is_that_of_transformers(
    workers: WorkerPool,
    tmp_path: Path,
    tiny_corpus: dict[str, Any],  # noqa: F811
) -> None:
    """The last stage's length and rotary base are those of the folder, and of the packs that its loss is of."""
    theirs = tmp_path / "theirs"
    build(**SHAPE, vocab=VOCAB, rotary_dim=16, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=6).save_pretrained(
        theirs
    )
    tree = {
        "data": {**tiny_corpus, "seq_length": 64},
        "train": {"global_batch_size": 4, "eval_samples": 4},
        "run": {"folder": str(tmp_path / "run"), "tensorboard": False},
        "stages": STAGES,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    pretrain(workers, "--config", tmp_path / "recipe.yaml", "--init-from", f"hf:{theirs}", ranks=1)
    lines = records(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert [line["stage"] for line in steps] == [1] * SHORT + [2] * LONG
    reported = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]

    convert("to-hf", tmp_path / "run", tmp_path / "out", "--format", "native")
    model = load(tmp_path / "out")
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    packs = megatron_m1.packed_data(tmp_path / "run" / "checkpoints" / f"step_{SHORT + LONG:08d}", split="validation")
    total, count = 0.0, 0
    for pack in packs:
        for document in pack.documents:
            span = slice(document.start, document.end)
            mask = pack.loss_mask[span] > 0
            with torch.no_grad():
                logits = model(pack.tokens[None, span]).logits[0]
            total += float(cross_entropy(logits[mask], pack.labels[span][mask], reduction="sum"))
            count += int(mask.sum())
    assert count > 0 and total / count == pytest.approx(reported, rel=LOSS_TOLERANCE)
