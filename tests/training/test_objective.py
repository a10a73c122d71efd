"""An objective that only this file knows: squared distances of losses from given ones, tokens weighed by fractions.

It trains on every axis of the mesh against torch's autograd, cross entropy and AdamW around the bare model. A batch's
weight is below 1 here, and packs are padded, with values that would show.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_m1.config import Config
from megatron_m1.config.resolve import resolve
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.figures import Figure
from megatron_m1.training.microbatch import MicroBatch
from megatron_m1.training.step import GRAD_NORM, LOSS, train_step
from megatron_m1.training.trained_model import build_chunks
from tests.model.meshes import assemble, my_share, packs, run_config, start, step_with_gradients
from tests.model.test_mesh_parity import GRADIENT_TOLERANCE, TRACE_TOLERANCE

DOCUMENTS = [[0, 1, 20, 36, 49], [0, 30, 49]]
"""Two and four ranks pad their 49 tokens."""
LR, STEPS = 3e-3, 3
SURPRISE = Figure("surprise", "surprise {:.3f}")
"""Mean loss of the weighed tokens."""

MESHES = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
}


class Distance:
    """Mean squared distance of each loss from the pack's ``wanted``, tokens weighed by its ``weights``."""

    figures = (SURPRISE,)

    def weight(self, sample: PackedSample) -> Tensor:
        return (sample.extra["weights"] * sample.loss_mask).sum()

    def total(self, losses: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[Figure, Tensor]]:
        weights = batch.extra["weights"] * batch.loss_mask
        # [1, n, 2] -> [1, n]
        distances = (losses - batch.extra["wanted"].sum(dim=-1)).square()
        return (weights * distances).sum(), {SURPRISE: (weights * losses).sum()}


def weighed_packs(step: int, scale: float = 1e-3) -> list[PackedSample]:
    """The global batch of ``step``: weights of 0 to ``scale``, and in two columns what losses should be."""
    generator = torch.Generator().manual_seed(step)
    batch = []
    for sample in packs(step, documents=DOCUMENTS):
        n = len(sample.tokens)
        extra = {
            "weights": scale * torch.rand(n, generator=generator),
            "wanted": 2.0 * torch.rand(n, 2, generator=generator),
        }
        batch.append(replace(sample, extra=extra, padding={"wanted": 1e6}))
    return batch


def config_on(parallel: dict[str, int], aux_loss: float = 0.0) -> Config:
    """Two layers of each kind; AdamW without decay or clipping, as the reference's."""
    config = run_config(
        parallel, documents=DOCUMENTS, num_layers=4, mixers=["lightning", "softmax"], moe_aux_loss_coeff=aux_loss
    )
    config.optimizer.clip_grad = config.optimizer.weight_decay = 0.0
    return config


def on_a_mesh(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """Every gradient of one batch, then some steps."""
    trained = start(config, world_size, Distance())
    first, parts = step_with_gradients(trained, weighed_packs(0))
    trace = [train_step(trained, my_share(trained, weighed_packs(step)), lr=LR) for step in range(1, STEPS + 1)]
    return {"parts": parts, "steps": [first, *trace]}


def by_hand(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """The same with nothing of ours around the model: its logits, and torch."""
    resolved = resolve(config, 1, has_gpu=False)
    (model,) = build_chunks(resolved, mesh.initialise(resolved.parallel, seed=resolved.train.seed))
    parameters = dict(model.named_parameters())
    settings = resolved.optimizer
    adam = torch.optim.AdamW(
        parameters.values(),
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=0.0,
    )
    gradients, steps = {}, []
    for step in range(STEPS + 1):
        adam.zero_grad()
        total, surprise, weight = torch.zeros(()), 0.0, 0.0
        for sample in weighed_packs(step):
            params = PackedBatchParams.of(SequenceLayout.build(sample.cu_seqlens))
            logits = model(sample.tokens[None], None, None, packed_seq_params=params, runtime_gather_output=True)
            losses = cross_entropy(logits[0], sample.labels, reduction="none")
            weights = sample.extra["weights"] * sample.loss_mask
            total = total + (weights * (losses - sample.extra["wanted"].sum(dim=1)).square()).sum()
            surprise += float((weights * losses).sum())
            weight += float(weights.sum())
        loss = total / weight
        loss.backward()
        if step == 0:
            gradients = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}
        adam.param_groups[0]["lr"] = LR if step else 0.0
        adam.step()
        steps.append((float(loss), surprise / weight, weight))
    return {"gradients": gradients, "steps": steps}


@pytest.fixture(scope="module")
def truth(workers: WorkerPool) -> dict[str, Any]:
    (result,) = workers.run(by_hand, config_on({}), world_size=1)
    return result


@pytest.mark.parametrize("name", MESHES)
def test_an_objective_with_fractional_weights_trains_on_a_mesh(
    name: str, workers: WorkerPool, truth: dict[str, Any]
) -> None:
    results = workers.run(on_a_mesh, config_on(MESHES[name]), world_size=2)
    gradients, expected = assemble([result["parts"] for result in results]), truth["gradients"]
    assert gradients.keys() == expected.keys()
    errors = {key: ((gradients[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]}"
    assert all(weight < 1 for _, _, weight in truth["steps"])
    norm = torch.stack([value.norm() for value in expected.values()]).norm().item()
    for result in results:
        assert result["steps"][0].figures[GRAD_NORM] == pytest.approx(norm, rel=GRADIENT_TOLERANCE)
        for number, (step, (loss, surprise, weight)) in enumerate(zip(result["steps"], truth["steps"], strict=True)):
            tolerance = TRACE_TOLERANCE if number > 1 else GRADIENT_TOLERANCE
            assert step.updated
            assert step.weight == pytest.approx(weight, rel=1e-6)
            assert step.figures[LOSS] == pytest.approx(loss, rel=tolerance)
            assert step.figures[SURPRISE] == pytest.approx(surprise, rel=tolerance)


def gradients_at_scale(rank: int, world_size: int, config: Config, scale: float) -> dict[str, Tensor]:
    """Every gradient of a batch whose weights are at most ``scale``."""
    _, parts = step_with_gradients(start(config, world_size, Distance()), weighed_packs(0, scale))
    return {name: part.value for name, part in parts.items()}


def test_neither_loss_nor_aux_loss_depends_on_the_scale_of_the_weights(workers: WorkerPool) -> None:
    """A power of 2 apart, all of it is equal but what is rounded in the divisor."""
    config = config_on({}, aux_loss=1.0)
    small, large = (workers.run(gradients_at_scale, config, scale, world_size=1)[0] for scale in (2.0**-9, 2.0**9))
    for name, value in large.items():
        assert (small[name] - value).norm() < GRADIENT_TOLERANCE * value.norm(), name
