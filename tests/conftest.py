"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.common.poison import nan_filled_empty
from megatron_m1.runtime.pool import WorkerPool

# Triton's kernels run under its interpreter, which must be chosen before anything imports triton, here and in workers.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what runs several processes."""
    for item in items:
        if "workers" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Worker processes shared by all tests: ``workers.run(function, *arguments, world_size=2)``."""
    pool = WorkerPool(preloaded=["megatron_m1.training.loop"])
    yield pool
    pool.close()


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """``torch.empty`` and its relatives give NaN, so that an unwritten output is seen (in this process only)."""
    with nan_filled_empty():
        yield
