"""How a step's tokens were dealt to the experts, over all layers and by depth: figures of its record."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_m1.training.figures import Figure

QUARTERS = 4
"""Groups of layers by depth, as equal as they can be; a model of fewer layers has fewer groups."""

EXPERT_LOAD = Figure("expert_load_max_over_mean", "load {:.2f}", importance=3)
"""Most loaded expert over the mean, averaged over layers; 0 for a validation."""
EXPERT_LOAD_ENTROPY = Figure("expert_load_entropy", "")
"""Entropy of the experts' shares over that of equal ones, averaged over layers: 1 at balance, 0 if one gets all."""
DROPPED_SHARE = Figure("dropped_share", "dropped {:.2%}", short="drop {:.0%}", hides_zero=True, importance=2)
"""Share of choices that the experts' capacity did not take; 0 without one."""
BY_DEPTH = {
    figure: [Figure(f"{figure.name}_quarter_{quarter + 1}", "") for quarter in range(QUARTERS)]
    for figure in (EXPERT_LOAD, EXPERT_LOAD_ENTROPY, DROPPED_SHARE)
}
"""The same of the first, second, third and last quarter of the layers."""


def load_figures(chosen: Tensor, kept: Tensor) -> dict[Figure, float]:
    """Figures of a step.

    Args:
        chosen: [layers, experts], tokens that chose each expert over the global batch, before any was dropped.
        kept: [layers], choices that were not dropped.

    Returns:
        Of all layers together, then by depth. 0 where a layer routed nothing.
    """
    totals = chosen.sum(1)
    if not bool((totals > 0).all()):
        return dict.fromkeys([EXPERT_LOAD, EXPERT_LOAD_ENTROPY, DROPPED_SHARE, *_all_by_depth(len(chosen))], 0.0)
    shares = chosen / totals[:, None]
    by_layer = {
        EXPERT_LOAD: chosen.amax(1) / chosen.mean(1),
        EXPERT_LOAD_ENTROPY: _entropy(shares),
        DROPPED_SHARE: 1.0 - kept / totals,
    }
    found = {figure: float(values.mean()) for figure, values in by_layer.items()}
    for figure, values in by_layer.items():
        parts = values.tensor_split(min(QUARTERS, len(values)))
        found |= {name: float(part.mean()) for name, part in zip(BY_DEPTH[figure], parts, strict=False)}
    return found


def _all_by_depth(layers: int) -> list[Figure]:
    return [figure for figures in BY_DEPTH.values() for figure in figures[: min(QUARTERS, layers)]]


def _entropy(shares: Tensor) -> Tensor:
    """[layers, experts] -> [layers], 1 for equal shares; one expert alone has all there is."""
    experts = shares.shape[1]
    if experts == 1:
        return shares.new_ones(len(shares))
    return -(shares * shares.clamp_min(1e-300).log()).sum(1) / math.log(experts)
