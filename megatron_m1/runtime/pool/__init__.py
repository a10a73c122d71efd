"""Functions on ranks, in processes that are kept between calls: for tests, benchmarks and measurements."""

from megatron_m1.runtime.pool.pool import WorkerPool

__all__ = ["WorkerPool"]
