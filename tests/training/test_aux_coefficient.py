"""The weight of the load-balancing loss by tokens: exact values, wrong points, and what the routers do with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.config.schedules import schedules_at
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.aux_coefficient import set_aux_loss_coefficient
from megatron_m1.training.step import AUX_LOSS
from tests.model.meshes import packs, run_config, start, step_with_gradients


def aux_loss_coefficient(tokens: int, config: Config) -> float:
    return schedules_at(config).aux_loss_coefficient(tokens)


def scheduled(points: list[float]) -> Config:
    config = Config()
    config.train.moe_aux_loss_coeff_schedule = points
    return config


@pytest.mark.parametrize(
    ("tokens", "weight"), [(0, 0.01), (10**12, 0.01), (2 * 10**12, 0.006), (3 * 10**12, 0.002), (10**13, 0.002)]
)
def test_linear_between_points(tokens: int, weight: float) -> None:
    assert aux_loss_coefficient(tokens, scheduled([1e12, 0.01, 3e12, 0.002])) == pytest.approx(weight, rel=1e-15)


def test_without_points_it_is_the_model_s() -> None:
    assert aux_loss_coefficient(7, Config()) == Config().model.moe_aux_loss_coeff


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("[0, 0.01, 5]", "has 3 numbers: give pairs"),
        ("[5, 0.01, 5, 0.1]", "must rise"),
        ("[0, -0.01]", "0 or above"),
        ("[0, .inf]", "finite"),
    ],
)
def test_wrong_points(points: str, message: str) -> None:
    config = parse_config([], [f"--train.moe_aux_loss_coeff_schedule={points}"])
    with pytest.raises(ValueError, match=rf"^train\.moe_aux_loss_coeff_schedule .*{message}"):
        resolve(config, 1, has_gpu=False)


def with_weight(rank: int, world_size: int, config: Config, weight: float | None) -> tuple[Any, Tensor]:
    """A step's figures and its last router's gradient."""
    config.optimizer.clip_grad = 0.0
    trained = start(config, world_size)
    if weight is not None:
        set_aux_loss_coefficient(trained, weight)
    result, _ = step_with_gradients(trained, packs())
    return result, trained.chunks[0].module.decoder.layers[-1].mlp.router.weight.main_grad.clone()


def test_a_weight_that_is_set_is_that_of_a_model_with_it(workers: WorkerPool) -> None:
    (result, gradient), (expected, wanted) = (
        workers.run(with_weight, run_config({}, moe_aux_loss_coeff=own), given, world_size=1)[0]
        for own, given in ((0.5, 0.25), (0.25, None))
    )
    assert torch.equal(gradient, wanted)
    assert result.figures[AUX_LOSS] == expected.figures[AUX_LOSS]
