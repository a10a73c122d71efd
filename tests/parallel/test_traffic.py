"""What the plans promise against what really goes through the process group, and against the mask's pairs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.context_ranks import Case, cases_for, counted_bytes, predicted_bytes
from megatron_m1.parallel.traffic import attention_pairs
from megatron_m1.runtime.pool import WorkerPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_plan(dtype: torch.dtype, workers: WorkerPool) -> None:
    cases = list(cases_for(4, heads=4, groups=2, dtype=dtype).values())
    by_rank = workers.run(counted_bytes, cases, world_size=4)
    for rank, counted in enumerate(by_rank):
        assert counted == [predicted_bytes(rank, 4, case) for case in cases]


def test_documents_within_segments_send_nothing(workers: WorkerPool) -> None:
    case = Case([0, 3, 10, 13, 20, 21, 30, 40])  # bounds at 10, 20, 30: the four segments of two ranks
    for counts in workers.run(counted_bytes, [case], world_size=2):
        assert set(counts[0].values()) == {(0, 0)}


def test_every_pair_is_counted_once() -> None:
    for case in cases_for(5).values():
        lengths = [end - start for start, end in zip(case.bounds[:-1], case.bounds[1:], strict=True)]
        counted = sum(attention_pairs(case.layout(rank, 5).ring_plan) for rank in range(5))
        assert counted == sum(length * (length + 1) // 2 for length in lengths)
