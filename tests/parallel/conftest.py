"""Fixtures of the tests of parallel/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed as dist


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
