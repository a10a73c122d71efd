"""Multi-process tests in plain pytest: a pool of gloo workers that outlives single tests, and NaN-poisoned memory."""

from tests.harness.poison import nan_filled_empty
from tests.harness.pool import WorkerPool

__all__ = ["WorkerPool", "nan_filled_empty"]
