"""Hung and failed steps end with the rank and the step named."""

from __future__ import annotations

import datetime
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_m1.config import Config
from megatron_m1.config.resolve import resolve
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.runtime.watchdog import (
    HUNG_EXIT_CODE,
    CollectiveError,
    Watchdog,
    is_collective_error,
    process_group_timeout,
)
from tests.runtime import hanging_rank, stopped_rank

TIMEOUT = 2.0


@pytest.mark.slow
def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """The rank that waits gets gloo's time-out with rank and step; the one that sleeps is ended by its watchdog."""
    command = [sys.executable, str(Path(hanging_rank.__file__))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(TIMEOUT)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(hanging_rank.WORLD_SIZE)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    waiting, sleeping = processes
    (line,) = [line for line in errors[0].splitlines() if "collective failed" in line]
    assert re.match(r"rank 0, step 3: a collective failed after \d+ s without progress \(RuntimeError: ", line)
    assert waiting.returncode == 1
    assert re.search(r"^rank 1 hung in step 3 for \d+ s; its main thread is here:$", errors[1], re.MULTILINE)
    assert "in sleep_forever" in errors[1]
    assert sleeping.returncode == HUNG_EXIT_CODE


@pytest.mark.slow
def test_ranks_that_were_stopped_go_on(tmp_path: Path) -> None:
    """Stopped for longer than the collective's time-out and the watchdog's allowance, one of them within the former."""
    command = [sys.executable, str(Path(stopped_rank.__file__))]
    ranks = range(stopped_rank.WORLD_SIZE)
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path), str(TIMEOUT)]) for rank in ranks]
    try:
        while not all((tmp_path / f"{rank}.ready").exists() for rank in ranks):
            assert [process.poll() for process in processes] == [None, None]
            busy(0.01)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        busy(2 * TIMEOUT + 1.0)
        (tmp_path / "go").touch()
        for process in processes:
            process.send_signal(signal.SIGCONT)
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert all((tmp_path / f"{rank}.done").exists() for rank in ranks)


def fail_twice(rank: int, world_size: int) -> list[str]:
    """Rank 0 waits in vain twice: gloo words the time-out and the closed pair after it differently."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2.0))
    assert isinstance(group, dist.ProcessGroup)
    if rank == 1:
        dist.recv(torch.empty(1), src=0)
        return []
    messages = []
    with Watchdog(rank, 60.0) as watchdog:
        for step in (1, 2):
            try:
                with watchdog.step(step):
                    dist.recv(torch.empty(1), src=1, group=group)
            except CollectiveError as error:
                messages.append(str(error))
    dist.send(torch.ones(1), dst=1)
    return messages


def group_timeouts(rank: int, world_size: int, seconds: float) -> tuple[set[float], int, str]:
    """Time-outs of the groups that a mesh makes, their number, and what waiting for an expert's state ends with."""
    from megatron.core import parallel_state

    from megatron_m1.runtime import mesh

    before = set(dist.distributed_c10d._world.pg_map)
    # Imports take longer than the ranks may differ from here on.
    dist.barrier()
    config = Config()
    config.parallel.distributed_timeout_seconds = seconds
    mesh.initialise(resolve(config, world_size, has_gpu=False).parallel, seed=1)
    made = set(dist.distributed_c10d._world.pg_map) - before
    found = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made}
    said = ""
    if rank == 0:
        pieces = [torch.empty(1) for _ in range(world_size)]
        try:
            dist.gather(torch.ones(1), pieces, group=parallel_state.get_expert_data_parallel_group_gloo())
        except RuntimeError as error:
            said = str(error)
        dist.send(torch.ones(1), dst=1)
    else:
        dist.recv(torch.empty(1), src=0)
    return found, len(made), said


def test_every_group_gives_up_when_it_should(workers: WorkerPool) -> None:
    """megatron-core leaves one group torch's half an hour: a rank that died in a save would be waited for so long."""
    (found, number, said), (others, *_) = workers.run(group_timeouts, 3.0, world_size=2)
    assert number > 10
    assert found == others == {3.0}
    assert "Timed out waiting 3000ms" in said


def test_every_wording_of_gloo_is_recognised(workers: WorkerPool) -> None:
    messages, _ = workers.run(fail_twice, world_size=2)
    assert [message.split(":")[0] for message in messages] == ["rank 0, step 1", "rank 0, step 2"]


def test_errors_of_collectives_are_one_line() -> None:
    with (
        Watchdog(3, 60.0) as watchdog,
        pytest.raises(CollectiveError, match=r"^rank 3, step 17: .*DistNetworkError: lost\)$"),
        watchdog.step(17),
    ):
        raise dist.DistNetworkError("lost\nC++ frames")


def test_other_errors_pass() -> None:
    with Watchdog(0, 60.0) as watchdog, pytest.raises(RuntimeError, match=r"^shape mismatch$"), watchdog.step(1):
        raise RuntimeError("shape mismatch")
    assert not is_collective_error(ValueError("gloo"))


def test_progress_and_a_new_step_give_the_whole_allowance() -> None:
    """What lies before progress or between steps does not count, and the first step has more."""
    with Watchdog(0, 60.0, grace_seconds=30.0, first_step_seconds=500.0) as watchdog:
        for step, allowance in ((0, 590.0), (1, 90.0)):
            before = time.monotonic()
            with watchdog.step(step):
                assert before + allowance <= watchdog.deadline <= time.monotonic() + allowance
                later = time.monotonic()
                watchdog.progress()
                assert later + allowance <= watchdog.deadline <= time.monotonic() + allowance


def busy(seconds: float) -> None:
    """Let ``seconds`` pass."""
    threading.Event().wait(seconds)


def test_who_gives_up_first() -> None:
    assert process_group_timeout("gloo", 600.0).total_seconds() == 600.0
    assert process_group_timeout("nccl", 600.0).total_seconds() == 660.0


def test_timeout_is_checked() -> None:
    with pytest.raises(ValueError, match="distributed_timeout_seconds is 0"):
        Watchdog(0, 0)
