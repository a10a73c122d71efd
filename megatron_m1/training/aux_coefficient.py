"""The weight of the load-balancing loss as a function of the tokens trained on."""

from __future__ import annotations

from itertools import batched, pairwise

from megatron_m1.config import Config
from megatron_m1.training.trained_model import TrainedModel


def aux_loss_coefficient(tokens: int, config: Config) -> float:
    """Return the weight in the step that ends at ``tokens``.

    Linear between the points of ``train.moe_aux_loss_coeff_schedule``, constant before the first and after the last;
    without points, ``model.moe_aux_loss_coeff``.
    """
    points = list(batched(config.train.moe_aux_loss_coeff_schedule, 2))
    if not points:
        return config.model.moe_aux_loss_coeff
    for (start, before), (end, after) in pairwise(points):
        if start <= tokens < end:
            return before + (after - before) * (tokens - start) / (end - start)
    return points[0][1] if tokens < points[0][0] else points[-1][1]


def set_aux_loss_coefficient(trained: TrainedModel, coefficient: float) -> None:
    """Let the routers weigh their loss by ``coefficient`` from now on."""
    for chunk in trained.chunks:
        chunk.config.moe_aux_loss_coeff = coefficient
