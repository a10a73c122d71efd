"""Figures of how tokens were dealt to experts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_m1.training.expert_load import (
    BY_DEPTH,
    DROPPED_SHARE,
    EXPERT_LOAD,
    EXPERT_LOAD_ENTROPY,
    load_figures,
)


def test_by_hand() -> None:
    """Five layers, two experts: balanced ones, one that starves an expert, one at 3 to 1, one that drops a half."""
    chosen = torch.tensor([[4, 4], [8, 0], [6, 2], [4, 4], [4, 4]]).double()
    found = load_figures(chosen, torch.tensor([8, 8, 8, 8, 4]).double())
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found[EXPERT_LOAD] == pytest.approx((1 + 2 + 1.5 + 1 + 1) / 5)
    assert found[EXPERT_LOAD_ENTROPY] == pytest.approx((1 + 0 + quarter + 1 + 1) / 5)
    assert found[DROPPED_SHARE] == pytest.approx(0.5 / 5)
    # Five layers in four quarters: the first has two.
    for figure, values in {
        EXPERT_LOAD: [1.5, 1.5, 1.0, 1.0],
        EXPERT_LOAD_ENTROPY: [0.5, quarter, 1.0, 1.0],
        DROPPED_SHARE: [0.0, 0.0, 0.0, 0.5],
    }.items():
        assert [found[part] for part in BY_DEPTH[figure]] == pytest.approx(values)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_layers_have_fewer_quarters(layers: int) -> None:
    found = load_figures(torch.full((layers, 3), 5.0), torch.full((layers,), 15.0))
    assert len(found) == 3 + 3 * layers
    assert all(value == pytest.approx(1.0) for figure, value in found.items() if "dropped" not in figure.name)


def test_nothing_routed() -> None:
    found = load_figures(torch.zeros(4, 3), torch.zeros(4))
    assert set(found.values()) == {0.0}
    assert len(found) == 15
