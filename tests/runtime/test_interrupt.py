"""Signals on one rank stop all ranks at the same step."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megatron_m1.launch import FORWARDED, SAME_PRESS_SECONDS, SECOND_INTERRUPT
from megatron_m1.runtime.interrupt import Interrupt, any_rank
from megatron_m1.runtime.pool import WorkerPool

SIGNAL_STEP = 3


def train_until_stopped(rank: int, world_size: int, number: signal.Signals) -> tuple[int, str | None, bool]:
    """Send ``number`` to the last rank in mid-step; return the step at which this rank stopped."""
    earlier = [signal.getsignal(number) for number in FORWARDED]
    with Interrupt() as interrupt:
        for step in range(1, 10):
            if step == SIGNAL_STEP and rank == world_size - 1:
                os.kill(os.getpid(), number)
            if interrupt.should_stop():
                break
    restored = [signal.getsignal(number) for number in FORWARDED] == earlier
    return step, interrupt.received, restored


def stop_within_pairs(rank: int, world_size: int) -> bool:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    assert isinstance(group, dist.ProcessGroup)
    return any_rank(rank == 2, group)


@pytest.mark.parametrize("number", FORWARDED)
def test_all_ranks_stop_at_the_same_step(workers: WorkerPool, number: signal.Signals) -> None:
    assert workers.run(train_until_stopped, number, world_size=2) == [
        (SIGNAL_STEP, None, True),
        (SIGNAL_STEP, number.name, True),
    ]


def test_the_first_ctrl_c_is_answered_and_the_second_ends_the_process_at_once() -> None:
    """Both in the middle of a call into C that Python's own handlers would wait for, for an hour and more."""
    program = """
import hashlib, os, signal, sys, threading, time
from megatron_m1.runtime.interrupt import Interrupt

def is_busy():
    frame = sys._current_frames()[threading.main_thread().ident]
    return frame.f_code.co_name == "busy"

def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)

def press():
    while not is_busy():
        time.sleep(0.01)
    # Two at once are one request.
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    answered.wait()
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

answered = threading.Event()
def say(line):
    print(line, interrupt.received, flush=True)
    answered.set()

with Interrupt(say) as interrupt:
    threading.Thread(target=press, daemon=True).start()
    busy()
"""
    environ = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    # The handler has not run: the answer did not wait for it.
    assert done.stdout == "SIGINT: finishing the first step, then saving None\n"
    assert done.stderr == f"{SECOND_INTERRUPT}\n"


def test_the_answer_names_the_step_that_will_be_the_last() -> None:
    said: queue.Queue[str] = queue.Queue()
    with Interrupt(said.put) as interrupt:
        assert interrupt.should_stop(promise="finishing step 2, then saving") is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert said.get(timeout=60) == "SIGTERM: finishing step 2, then saving"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupt.should_stop(promise="finishing step 3, then saving") == "SIGTERM"
    # One answer is enough.
    assert said.empty()


def test_every_sigint_is_one_request_to_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets one as a process of the job and one from its launcher, which alone can tell a second Ctrl-C."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Interrupt() as interrupt:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            time.sleep(2 * SAME_PRESS_SECONDS)
        assert interrupt.received == "SIGINT"


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_only_the_given_group_agrees(workers: WorkerPool) -> None:
    assert workers.run(stop_within_pairs, world_size=4) == [False, False, True, True]


def test_alone_and_earlier_handler_restored() -> None:
    seen: list[int] = []
    earlier = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with Interrupt() as interrupt:
            assert not interrupt.should_stop()
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.should_stop()
            assert interrupt.received == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, earlier)
