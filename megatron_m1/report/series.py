"""A figure over any number of steps in bounded memory: buckets of steps that keep their extremes and their mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BUCKETS = 4096
"""That a series has at most; a power of two. A screen has as many columns."""

type Steps = npt.NDArray[np.int64]
type Values = npt.NDArray[np.float64]


class Series:
    """Values by step. A bucket holds ``width`` steps, and pairs of buckets become one when the steps outgrow them.

    The least and the greatest value of a bucket stay with their own steps, so that a spike of one step among millions
    is still there, where it was. Values may come in any order.
    """

    def __init__(self, buckets: int = BUCKETS) -> None:
        self.width = 1
        """Steps in a bucket: a power of two."""
        self.count = np.zeros(buckets, np.int64)
        self._sum = np.zeros(buckets)
        self._step_sum = np.zeros(buckets)
        self._low, self._high = np.full(buckets, np.inf), np.full(buckets, -np.inf)
        self._low_step, self._high_step = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
        self.last: tuple[int, float] | None = None
        """Step and value that came last."""

    def add(self, steps: Steps, values: Values) -> None:
        """Take in finite values.

        Args:
            steps: ``[n]``, 0 and above.
            values: ``[n]``.
        """
        if not len(steps):
            return
        self.last = int(steps[-1]), float(values[-1])
        while int(steps.max()) // self.width >= len(self.count):
            self._halve()
        bucket = steps // self.width
        order = np.lexsort((values, bucket))
        bucket, steps, values = bucket[order], steps[order], values[order]
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        ends = np.append(starts[1:], len(bucket)) - 1
        at = bucket[starts]
        self.count[at] += ends - starts + 1
        self._sum[at] += np.add.reduceat(values, starts)
        self._step_sum[at] += np.add.reduceat(steps.astype(np.float64), starts)
        lower = values[starts] < self._low[at]
        self._low[at[lower]], self._low_step[at[lower]] = values[starts[lower]], steps[starts[lower]]
        higher = values[ends] > self._high[at]
        self._high[at[higher]], self._high_step[at[higher]] = values[ends[higher]], steps[ends[higher]]

    def _halve(self) -> None:
        kept = self._merged(2)
        empty = Series(len(self.count))
        for name in ("count", "_sum", "_step_sum", "_low", "_high", "_low_step", "_high_step"):
            whole = getattr(empty, name)
            whole[: len(self.count) // 2] = getattr(kept, name)
            setattr(self, name, whole)
        self.width *= 2

    def _merged(self, factor: int) -> Series:
        """Return a copy in which ``factor`` buckets, a power of two, are one."""
        merged = Series(0)
        merged.width, merged.last = self.width * factor, self.last
        for name in ("count", "_sum", "_step_sum"):
            setattr(merged, name, getattr(self, name).reshape(-1, factor).sum(1))  # [B] -> [B / factor]
        rows = np.arange(len(merged.count))
        for name, choose in (("_low", np.argmin), ("_high", np.argmax)):
            values = getattr(self, name).reshape(-1, factor)  # [B] -> [B / factor, factor]
            best = choose(values, axis=1)
            setattr(merged, name, values[rows, best])
            setattr(merged, f"{name}_step", getattr(self, f"{name}_step").reshape(-1, factor)[rows, best])
        return merged

    def _at_most(self, buckets: int) -> Series:
        used = np.flatnonzero(self.count)
        factor = 1
        while len(used) and used[-1] // factor - used[0] // factor >= buckets and factor < len(self.count):
            factor *= 2
        return self._merged(factor) if factor > 1 else self

    def extremes(self, buckets: int) -> tuple[Steps, Values]:
        """Return the points of a curve with every spike: the least and the greatest value of each bucket.

        Args:
            buckets: at most so many, 1 or more.

        Returns:
            Steps and values, both ``[n]``, n at most twice ``buckets``, by step.
        """
        few = self._at_most(buckets)
        used = np.flatnonzero(few.count)
        steps = np.stack([few._low_step[used], few._high_step[used]], axis=1)  # [n, 2]
        values = np.stack([few._low[used], few._high[used]], axis=1)
        order = np.argsort(steps, axis=1, kind="stable")
        steps = np.take_along_axis(steps, order, 1).ravel()  # [n, 2] -> [2 n]
        values = np.take_along_axis(values, order, 1).ravel()
        # A bucket of one value has it twice.
        fresh = np.ones(len(steps), bool)
        fresh[1:] = (np.diff(steps) != 0) | (np.diff(values) != 0)
        return steps[fresh], values[fresh]

    def means(self, buckets: int) -> tuple[Values, Values]:
        """Return the trend: mean step and mean value, both ``[n]``, of at most so many buckets, 1 or more."""
        few = self._at_most(buckets)
        used = np.flatnonzero(few.count)
        count, step_sum, value_sum = few.count[used], few._step_sum[used], few._sum[used]
        if len(used) > 1 and 2 * count[-1] < count[-2]:
            # The last bucket has just begun: a few steps are no trend.
            for part in (count, step_sum, value_sum):
                part[-2] += part[-1]
            count, step_sum, value_sum = count[:-1], step_sum[:-1], value_sum[:-1]
        return step_sum / count, value_sum / count

    def total(self) -> int:
        """Return how many values came."""
        return int(self.count.sum())
