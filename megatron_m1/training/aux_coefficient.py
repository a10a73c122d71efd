"""The weight of the load-balancing loss, which a schedule may change from step to step."""

from __future__ import annotations

from megatron_m1.training.trained_model import TrainedModel


def set_aux_loss_coefficient(trained: TrainedModel, coefficient: float) -> None:
    """Let the routers weigh their loss by ``coefficient`` from now on."""
    for chunk in trained.chunks:
        chunk.config.moe_aux_loss_coeff = coefficient
