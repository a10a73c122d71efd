"""Any number of values in buckets: extremes with their steps, means, and no growth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.report.series import Series


def filled(steps: np.ndarray, values: np.ndarray, buckets: int, parts: int = 1) -> Series:
    series = Series(buckets)
    for part in np.array_split(np.arange(len(steps)), parts):
        series.add(steps[part], values[part])
    return series


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.integers(0, 3000), min_size=1, max_size=200),
    seed=st.integers(0, 99),
    parts=st.integers(1, 5),
    buckets=st.sampled_from([1, 4, 64]),
)
def test_buckets_have_the_extremes_and_means_of_their_steps(
    steps: list[int], seed: int, parts: int, buckets: int
) -> None:
    at, values = np.array(steps), np.random.default_rng(seed).normal(size=len(steps))
    series = filled(at, values, 64, parts)
    assert series.width * 64 > at.max() and series.total() == len(at)
    x, y = series.extremes(buckets)
    assert len(x) <= 2 * buckets and (np.diff(x) >= 0).all()
    points = set(zip(at.tolist(), values.tolist(), strict=True))
    assert set(zip(x.tolist(), y.tolist(), strict=True)) <= points
    assert (y.min(), y.max()) == (values.min(), values.max())
    mean_x, mean_y = series.means(1)
    np.testing.assert_allclose([mean_x[0], mean_y[0]], [at.mean(), values.mean()], atol=1e-12)


def test_few_steps_are_kept_one_by_one() -> None:
    steps, values = np.arange(1, 51), np.sin(np.arange(1, 51))
    x, y = filled(steps, values, 64).extremes(64)
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_array_equal(y, values)


@pytest.mark.parametrize("spike", [1, 777_777, 1_000_000])
def test_a_spike_of_one_step_among_a_million_is_still_there(spike: int) -> None:
    values = np.random.default_rng(0).normal(2.0, 0.05, 1_000_000)
    values[spike - 1] = -9.0
    series = filled(np.arange(1, 1_000_001), values, 4096, parts=50)
    assert len(series.count) == 4096 and series.width == 256
    for buckets in (1024, 100, 16):
        x, y = series.extremes(buckets)
        assert len(x) <= 2 * buckets
        assert (x[y.argmin()], y.min()) == (spike, -9.0)
    assert abs(series.means(100)[1] - 2.0).max() < 0.01


def test_a_trend_does_not_end_in_a_bucket_that_has_just_begun() -> None:
    values = np.ones(129)
    values[-1] = 100.0
    x, y = filled(np.arange(129), values, 256).means(8)
    assert len(x) == 4 and y[-1] == pytest.approx((32 + 100.0) / 33)
