"""Which steps are applied, which are skipped, when the run ends."""

from __future__ import annotations

import math

import pytest

from megatron_m1.training.steps_guard import NonFiniteError, StepsGuard


def test_skips_are_counted_and_a_good_step_ends_the_row() -> None:
    guard = StepsGuard(3)
    counts = []
    for step, (loss, norm) in enumerate([(2.0, 1.0), (math.nan, 1.0), (2.0, math.inf), (2.0, 0.0), (-math.inf, 1.0)]):
        guard.record(step + 1, loss, norm)
        counts.append((guard.total, guard.in_row))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def test_too_many_in_a_row_across_a_restart() -> None:
    guard = StepsGuard(3)
    guard.record(7, math.nan, 1.0)
    guard.record(8, math.nan, 1.0)
    resumed = StepsGuard(3)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError, match=r"^steps 7 to 9: .* 3 times in a row .*gradient norm inf.*$") as caught:
        resumed.record(9, 1.0, math.inf)
    assert "\n" not in str(caught.value)


def test_limit_is_checked() -> None:
    with pytest.raises(ValueError, match="max_skipped_steps is 0"):
        StepsGuard(0)
