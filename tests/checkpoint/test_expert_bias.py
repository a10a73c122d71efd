"""The bias by which sigmoid routers choose is kept, and comes back on any mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_m1
from megatron_m1.checkpoint.contents import check_shape
from megatron_m1.config import Config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import LOSS, train_step
from tests.checkpoint.checkpoint_runs import LR, open_checkpoints, run_config, state_at
from tests.model.meshes import COPIES, my_share, packs, start
from tests.model.test_balancing import SIGMOID, biases


def saved(rank: int, world_size: int, config: Config, folder: Path) -> tuple[dict[int, Tensor], float]:
    """Three steps, a checkpoint, one step more: the biases saved, and that step's loss."""
    trained = start(config, world_size)
    for step in range(3):
        train_step(trained, my_share(trained, packs(step)), lr=LR)
    before = biases(trained)
    open_checkpoints(folder, config).save(trained, state_at(3))
    return before, train_step(trained, my_share(trained, packs(3)), lr=LR).figures[LOSS]


def loaded(rank: int, world_size: int, config: Config, folder: Path) -> tuple[dict[int, Tensor], float]:
    """The biases that were loaded, and the next step's loss."""
    trained = start(config, world_size)
    assert open_checkpoints(folder, config).load_newest(trained) is not None
    after = biases(trained)
    return after, train_step(trained, my_share(trained, packs(3)), lr=LR).figures[LOSS]


@pytest.mark.slow
def test_another_mesh_and_a_whole_model_have_the_bias(workers: WorkerPool, tmp_path: Path) -> None:
    meshes: list[tuple[int, dict[str, Any]]] = [
        (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
    ]
    folder = tmp_path / "checkpoints"
    (kept, loss), *_ = workers.run(saved, run_config({}, **SIGMOID), folder, world_size=1)
    assert any(bias.any() for bias in kept.values())
    whole = megatron_m1.load(tmp_path, device="cpu").module
    for layer in whole.decoder.layers:
        assert torch.equal(layer.mlp.router.expert_bias, kept[layer.layer_number])
    for world_size, parallel in meshes:
        for found, again in workers.run(loaded, run_config(parallel, **SIGMOID), folder, world_size=world_size):
            assert found
            for layer, bias in found.items():
                assert torch.equal(bias, kept[layer])
            assert again == pytest.approx(loss, rel=COPIES)


@pytest.mark.parametrize("field", ["moe_router_score_function", "moe_router_enable_expert_bias"])
def test_another_way_to_choose_is_another_model(field: str) -> None:
    """Without its bias, or with other scores, a checkpoint's routers would choose other experts in silence."""
    saved_model, plain = run_config({}, **SIGMOID).model, run_config({}).model
    changed = replace(saved_model, **{field: getattr(plain, field)})
    check_shape(saved_model, saved_model, Path("c"), fix="fix")
    with pytest.raises(ValueError, match=rf"^model\.{field} is .*, but checkpoint c has .*: fix"):
        check_shape(changed, saved_model, Path("c"), fix="fix")
