"""Which steps are applied, which are skipped, when the run ends."""

from __future__ import annotations

import math

import pytest

from megatron_m1.training.steps_guard import NonFiniteError, StepsGuard


def test_skips_are_counted_and_a_good_step_ends_the_row() -> None:
    guard = StepsGuard(3)
    assert guard.accepts(1, 2.0, 1.0)
    assert not guard.accepts(2, math.nan, 1.0)
    assert not guard.accepts(3, 2.0, math.inf)
    assert guard.accepts(4, 2.0, 0.0)
    assert not guard.accepts(5, -math.inf, 1.0)
    assert (guard.total, guard.in_row) == (3, 1)


def test_too_many_in_a_row_across_a_restart() -> None:
    guard = StepsGuard(3)
    guard.accepts(7, math.nan, 1.0)
    guard.accepts(8, math.nan, 1.0)
    resumed = StepsGuard(3)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError, match=r"^steps 7 to 9: .* 3 times in a row .*gradient norm inf.*$") as caught:
        resumed.accepts(9, 1.0, math.inf)
    assert "\n" not in str(caught.value)


def test_limit_is_checked() -> None:
    with pytest.raises(ValueError, match="max_skipped_steps is 0"):
        StepsGuard(0)
