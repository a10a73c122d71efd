"""The worker pool itself: results, exceptions, deaths, hangs, reuse."""

from __future__ import annotations

import os
import pickle
import threading

import pytest
import torch
import torch.distributed as dist

from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.runtime.pool.messages import pickled_exception


def rank_sum(rank: int, world_size: int, factor: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor([factor * rank])
    dist.all_reduce(total)
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == world_size
    return os.getpid(), total


def os_pid(rank: int, world_size: int) -> int:
    return os.getpid()


def fail_on_last(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise KeyError("planted")
    dist.all_reduce(torch.ones(1))


def die_on_first(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def hang_on_last(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        threading.Event().wait()


def own_group(rank: int, world_size: int) -> float:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return float(total)


def build_parallel_state(rank: int, world_size: int) -> int:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return parallel_state.get_tensor_model_parallel_rank()


def test_results_in_rank_order_and_workers_reused(workers: WorkerPool) -> None:
    first = workers.run(rank_sum, 2.0, world_size=3)
    second = workers.run(rank_sum, 1.0, world_size=2)
    assert [total.item() for _, total in first] == [6.0, 6.0, 6.0]
    assert [total.item() for _, total in second] == [1.0, 1.0]
    assert [pid for pid, _ in first][:2] == [pid for pid, _ in second]


def test_process_group_of_the_function(workers: WorkerPool) -> None:
    for _ in range(2):
        assert workers.run(own_group, world_size=2, process_group=False) == [3.0, 3.0]


def test_exception_keeps_type_rank_traceback_and_the_workers(workers: WorkerPool) -> None:
    before = workers.run(os_pid, world_size=2)
    with pytest.raises(KeyError, match="planted") as caught:
        workers.run(fail_on_last, world_size=2)
    (note,) = caught.value.__notes__
    assert "rank 1 of 2" in note
    assert "fail_on_last" in note
    assert workers.run(os_pid, world_size=2) == before


class TwoPartError(Exception):
    """Is rebuilt from its message alone, as pickle does it, which its constructor refuses."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(f"{part} and {other}")


class HeldError(Exception):
    """Holds what can't be pickled."""

    def __init__(self) -> None:
        super().__init__("held")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "message", "reason"),
    [
        (TwoPartError("one", "two"), "TwoPartError: one and two", "'other'"),
        (HeldError(), "HeldError: held", "'_thread.lock'"),
    ],
)
def test_an_exception_that_can_not_travel_is_told_as_another(error: Exception, message: str, reason: str) -> None:
    told = pickle.loads(pickled_exception(error))
    assert type(told) is RuntimeError and str(told) == message
    (note,) = told.__notes__
    assert note.startswith("told as text, since it can't be pickled: TypeError: ") and reason in note


def test_death_is_named_and_the_rank_replaced(workers: WorkerPool) -> None:
    before = workers.run(os_pid, world_size=2)
    with pytest.raises(RuntimeError, match="rank 0 ended with exit code 7"):
        workers.run(die_on_first, world_size=2)
    after = workers.run(os_pid, world_size=2)
    assert [now == then for now, then in zip(after, before, strict=True)] == [False, True]


def test_hang_names_ranks_and_stacks(workers: WorkerPool) -> None:
    before = workers.run(os_pid, world_size=2)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not answer within 3 s") as caught:
        workers.run(hang_on_last, world_size=2, timeout=3.0)
    assert "hang_on_last" in str(caught.value)
    after = workers.run(os_pid, world_size=2)
    assert [now == then for now, then in zip(after, before, strict=True)] == [True, False]


def test_parallel_state_does_not_reach_the_next_call(workers: WorkerPool) -> None:
    for world_size in (2, 1):
        assert workers.run(build_parallel_state, world_size=world_size) == list(range(world_size))


def test_world_size_is_checked(workers: WorkerPool) -> None:
    with pytest.raises(ValueError, match="world_size is 9"):
        workers.run(os_pid, world_size=9)


def test_nan_memory(nan_memory: None) -> None:
    like = torch.zeros(3, dtype=torch.bfloat16)
    for tensor in (torch.empty(2, 3), torch.empty_like(like), like.new_empty(5), torch.empty_strided((2, 2), (2, 1))):
        assert tensor.isnan().all()
    assert torch.empty(4, dtype=torch.int64).dtype == torch.int64
