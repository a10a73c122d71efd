"""The weight of the load-balancing loss, which a schedule may change from step to step."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_m1.training.figures import Figure
from megatron_m1.training.step import AUX_LOSS
from megatron_m1.training.trained_model import TrainedModel

AUX_LOSS_COEFF = Figure("aux_loss_coeff", "")
"""Weight of the load-balancing loss; only in runs that have a schedule of it."""


def set_aux_loss_coefficient(trained: TrainedModel, coefficient: float) -> None:
    """Let the routers weigh their loss by ``coefficient`` from now on."""
    for chunk in trained.chunks:
        chunk.config.moe_aux_loss_coeff = coefficient


def balancing_figures(
    trained: TrainedModel, figures: Mapping[Figure, float], *, is_scheduled: bool
) -> dict[Figure, float]:
    """Return ``figures`` of a step as they are recorded: without AUX_LOSS where no router computed one.

    Args:
        trained: whose routers still have the step's weight.
        figures: of the step, AUX_LOSS among them, which is 0 where nothing weighed it.
        is_scheduled: record that weight as well.
    """
    config = trained.chunks[0].config
    weight = config.moe_aux_loss_coeff
    is_computed = weight != 0 and config.moe_router_load_balancing_type != "none"
    recorded: dict[Figure, float] = {}
    for figure, value in figures.items():
        if figure != AUX_LOSS or is_computed:
            recorded[figure] = value
        if figure == AUX_LOSS and is_scheduled:
            recorded[AUX_LOSS_COEFF] = weight
    return recorded
