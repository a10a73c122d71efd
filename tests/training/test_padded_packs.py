"""A pack of whole documents has padding at its end, which neither losses nor routers know of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_m1.data.packed import PackedSample, pad_pack
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import AUX_LOSS, GRAD_NORM, LOSS
from tests.model.meshes import assemble, packs, run_config, start, step_with_gradients
from tests.model.test_mesh_parity import GRADIENT_TOLERANCE

FILLED = [[0, 1, 20, 37], [0, 23, 37]]
LENGTH = 50
FIGURES = (LOSS, AUX_LOSS, GRAD_NORM)


def one_step(rank: int, world_size: int, padded_to: int | None, parallel: dict[str, int]) -> dict[str, Any]:
    """A step on the filled parts alone, or on packs of ``padded_to`` tokens as a stream gives them."""
    batch: list[PackedSample] = packs(documents=FILLED)
    if padded_to is not None:
        batch = [pad_pack(sample, padded_to) for sample in batch]
        # The padding comes with the pack: nothing but what it says tells it from a document.
        assert all(sample.real_tokens == FILLED[0][-1] for sample in batch)
    bounds = [[*documents[:-1], padded_to or documents[-1]] for documents in FILLED]
    config = run_config(parallel, documents=bounds, moe_z_loss_coeff=1e-3)
    config.optimizer.clip_grad = config.optimizer.weight_decay = 0.0
    result, parts = step_with_gradients(start(config, world_size), batch)
    return {"figures": [result.figures[figure] for figure in FIGURES], "parts": parts, "routing": result.routing}


def test_padding_changes_nothing(workers: WorkerPool) -> None:
    (alone,) = workers.run(one_step, None, {}, world_size=1)
    (padded,) = workers.run(one_step, LENGTH, {}, world_size=1)
    shared = workers.run(one_step, LENGTH, {"context_parallel_size": 2}, world_size=2)
    wanted = assemble([alone["parts"]])
    for found, parts in ((padded, [padded["parts"]]), (shared[0], [each["parts"] for each in shared])):
        torch.testing.assert_close(found["figures"], alone["figures"], rtol=1e-5, atol=1e-7)
        assert found["routing"].keys() == alone["routing"].keys()
        for figure, value in alone["routing"].items():
            assert abs(found["routing"][figure] - value) < 1e-6, figure
        for name, gradient in assemble(parts).items():
            assert (gradient - wanted[name]).norm() <= GRADIENT_TOLERANCE * wanted[name].norm(), name


def test_without_the_mark_it_would_be_a_document(workers: WorkerPool) -> None:
    (marked,) = workers.run(one_step, LENGTH, {}, world_size=1)
    (unmarked,) = workers.run(one_unmarked_step, world_size=1)
    assert marked["figures"][1] != unmarked["figures"][1]


def one_unmarked_step(rank: int, world_size: int) -> dict[str, Any]:
    """As ``one_step``, on packs that say nothing of their padding."""
    batch = [replace(pad_pack(sample, LENGTH), real_tokens=None) for sample in packs(documents=FILLED)]
    config = run_config({}, documents=[[*documents[:-1], LENGTH] for documents in FILLED], moe_z_loss_coeff=1e-3)
    config.optimizer.clip_grad = config.optimizer.weight_decay = 0.0
    result, _ = step_with_gradients(start(config, world_size), batch)
    return {"figures": [result.figures[figure] for figure in FIGURES]}
