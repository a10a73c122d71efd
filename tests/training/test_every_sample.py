"""``train.loss_normalization: sample``: every conversation weighs the same, against torch's own mean of means."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_m1.config import Config, TrainConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.data.packed import PackedSample, pad_pack
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.microbatch import label_shares
from megatron_m1.training.objective import EverySample, NextToken, objective_of
from megatron_m1.training.step import LOSS
from megatron_m1.training.trained_model import build_chunks
from tests.model.meshes import assemble, packs, run_config, start, step_with_gradients
from tests.model.test_mesh_parity import GRADIENT_TOLERANCE

DOCUMENTS = [[0, 1, 20, 36, 49], [0, 30, 49]]
"""Of two ranks that share a pack each holds a part of most documents, and padding."""
LEARNT = [[(3, 9), (12, 19), (25, 26), (40, 48)], [(45, 48)]]
"""Labels that are learnt: of the first pack's documents none, two turns, one label, eight labels; of the second's none
of the first, and three of the second."""


def conversations() -> list[PackedSample]:
    batch = []
    for sample, spans in zip(packs(documents=DOCUMENTS), LEARNT, strict=True):
        mask = torch.zeros_like(sample.loss_mask)
        for begin, end in spans:
            mask[begin:end] = 1.0
        batch.append(replace(sample, loss_mask=mask))
    return batch


def config_on(parallel: dict[str, int]) -> Config:
    config = run_config(
        parallel,
        {"loss_normalization": "sample"},
        documents=DOCUMENTS,
        num_layers=2,
        mixers=["lightning", "softmax"],
        moe_aux_loss_coeff=0.0,
    )
    config.optimizer.clip_grad = config.optimizer.weight_decay = 0.0
    return config


def on_a_mesh(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    step, parts = step_with_gradients(start(config, world_size, objective_of(config.train)), conversations())
    return {"parts": parts, "step": step}


def by_hand(rank: int, world_size: int, config: Config) -> tuple[dict[str, Tensor], float]:
    """Nothing of ours but the model: a loop over conversations."""
    resolved = resolve(config, 1, has_gpu=False)
    (model,) = build_chunks(resolved, mesh.initialise(resolved.parallel, seed=resolved.train.seed))
    means = []
    for sample, bounds in zip(conversations(), DOCUMENTS, strict=True):
        params = PackedBatchParams.of(SequenceLayout.build(sample.cu_seqlens))
        logits = model(sample.tokens[None], None, None, packed_seq_params=params, runtime_gather_output=True)
        losses = cross_entropy(logits[0], sample.labels, reduction="none")
        for begin, end in itertools.pairwise(bounds):
            learnt = losses[begin:end][sample.loss_mask[begin:end] == 1]
            if len(learnt):
                means.append(learnt.mean())
    loss = torch.stack(means).mean()
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert len(means) == 4
    return gradients, float(loss)


@pytest.fixture(scope="module")
def truth(workers: WorkerPool) -> tuple[dict[str, Tensor], float]:
    (result,) = workers.run(by_hand, config_on({}), world_size=1)
    return result


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [({}, 1), ({"context_parallel_size": 2}, 2), ({}, 2)],
    ids=["one process", "cp2", "dp2"],
)
def test_every_conversation_weighs_the_same(
    parallel: dict[str, int], ranks: int, workers: WorkerPool, truth: tuple[dict[str, Tensor], float]
) -> None:
    results = workers.run(on_a_mesh, config_on(parallel), world_size=ranks)
    gradients, (expected, loss) = assemble([result["parts"] for result in results]), truth
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < GRADIENT_TOLERANCE * value.norm(), name
    for result in results:
        assert result["step"].weight == 4
        assert result["step"].figures[LOSS] == pytest.approx(loss, rel=GRADIENT_TOLERANCE)


def test_shares_of_a_pack() -> None:
    """Padding has none, a piece of a document counts as one, and masks may be fractions."""
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5, 1.0])
    tokens = torch.arange(8)
    sample = PackedSample(tokens, tokens + 1, mask, torch.tensor([0, 3, 5, 8], dtype=torch.int32))
    padded = pad_pack(sample, 10)
    assert label_shares(padded).tolist() == [0.0, 0.5, 0.5, 0.0, 0.0, 0.25, 0.25, 0.5, 0.0, 0.0]
    assert int(EverySample().weight(sample)) == int(EverySample().weight(padded)) == 2


def test_the_configuration_chooses() -> None:
    assert isinstance(objective_of(TrainConfig()), NextToken)
    assert isinstance(objective_of(TrainConfig(loss_normalization="sample")), EverySample)
