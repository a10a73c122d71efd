"""The head in the whole model, split over tensor ranks: no step gets its loss from the logits of the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.config import Config
from megatron_m1.layers.head import token_losses
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import evaluate, train_step
from tests.model.meshes import PACKS, packs, run_config, start

LENGTH = PACKS[0][-1]
VOCAB = 104
TOLERANCES = {"fp32": 1e-6, "bf16": 2.0**-8}
"""Relative to the logits of size 1 to 5: one more rounding in the weight's precision."""


class LogitRows(TorchDispatchMode):
    """Most rows of a tensor that has a column for every word of this rank."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.most = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.columns:
                self.most = max(self.most, leaf.numel() // self.columns)
        return out


def rows_and_losses(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """Logit rows of a step, of a validation and of whole logits; each token's loss by the head and by its logits."""
    trained = start(config, world_size)
    batch = packs()[:2]
    meters = {name: LogitRows(VOCAB // world_size) for name in ("train", "evaluate", "logits")}
    with meters["train"]:
        assert train_step(trained, batch, lr=0.0).updated
    with meters["evaluate"]:
        evaluate(trained, batch)
    sample, model = batch[0], trained.chunks[0]
    params = PackedBatchParams.of(SequenceLayout.build(sample.cu_seqlens))
    with torch.no_grad(), meters["logits"]:
        loss = token_losses(model, sample.tokens[None], sample.labels[None], params)
        logits = model(sample.tokens[None], None, None, packed_seq_params=params, runtime_gather_output=True)
    whole = cross_entropy(logits[0].double(), sample.labels, reduction="none")
    return {
        "rows": {name: meter.most for name, meter in meters.items()},
        "shapes": (tuple(loss.shape), tuple(logits.shape)),
        "dtypes": (loss.dtype, logits.dtype),
        "error": (loss[0].double() - whole).abs().max().item(),
    }


@pytest.mark.parametrize("precision", TOLERANCES)
def test_steps_and_validations_have_no_logits_of_the_sequence(precision: str, workers: WorkerPool) -> None:
    config = run_config(
        {"tensor_model_parallel_size": 2}, {"precision": "bf16"}, lm_head_precision=precision, hidden_size=24
    )
    for result in workers.run(rows_and_losses, config, world_size=2):
        rows = result["rows"]
        # 24 is the transposed weight; chunks have 16 to 24 tokens, a sequence 50.
        assert 16 <= rows["train"] <= 24 and 16 <= rows["evaluate"] <= 24
        assert rows["logits"] >= LENGTH
        assert result["shapes"] == ((1, LENGTH), (1, LENGTH, VOCAB))
        assert result["dtypes"] == (torch.float32, torch.float32 if precision == "fp32" else torch.bfloat16)
        assert result["error"] < TOLERANCES[precision] * 5
