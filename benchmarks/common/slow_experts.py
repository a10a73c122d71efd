"""Experts whose products take as long as a slower processor's, so that a loaded machine's noise is a small share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne


class SlowExperts(OneByOne):
    """A pass (forward, data, weights) of ``rows`` rows takes ``seconds_per_row`` times as many seconds at least."""

    def __init__(self, seconds_per_row: float) -> None:
        self._pace = seconds_per_row

    def _sleep(self, begun: float, rows: int) -> None:
        time.sleep(max(0.0, begun + rows * self._pace - time.monotonic()))

    def forward(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """As ``OneByOne``'s, later."""
        begun = time.monotonic()
        found = super().forward(x, scale, counts, weights)
        self._sleep(begun, len(x))
        return found

    def backward(self, kept: Any, grad: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Any]:
        """As ``OneByOne``'s, later."""
        begun = time.monotonic()
        found = super().backward(kept, grad, weights)
        self._sleep(begun, len(grad))
        return found

    def add_weight_gradients(self, pending: Any, totals: list[Tensor | None], *, more: bool) -> None:
        """As ``OneByOne``'s, later."""
        begun = time.monotonic()
        super().add_weight_gradients(pending, totals, more=more)
        self._sleep(begun, sum(len(part.fc2[0]) for part in pending if part.fc2 is not None))
