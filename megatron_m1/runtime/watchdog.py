"""A hung or failed collective ends the run with one line that names the rank and the step.

Two nets. A backend that notices its own time-out raises in the main thread: the error is turned into a
``CollectiveError``. What no backend notices (a rank that never reaches the collective, a kernel that never ends) is
seen by a thread: it prints rank, step and the main thread's stack, and ends the process, so that torchrun ends the job.

Time in which the processes were stopped (Ctrl-Z, ``scontrol suspend``) is no hang. gloo's clock can't be told so, and
its ``abort`` leaves a collective waiting; so the thread keeps the time of collectives, and cuts the connections when it
is up. Messages between two ranks (pipeline stages, context parallelism) keep gloo's clock, which is set once.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import psutil
import torch
import torch.distributed as dist

from megatron_m1.printing import say_at_once

HUNG_EXIT_CODE = 70
"""Exit status of a process that its watchdog ended (EX_SOFTWARE of sysexits.h)."""
GRACE_SECONDS = 30.0
"""By how much one of the two nets waits longer than the other."""
FIRST_STEP_SECONDS = 600.0
"""Added to the first step's allowance: kernels are compiled and communicators built in it."""
PULSE_SECONDS = 1.0
"""How often a watchdog looks at the clock; it takes a longer sleep for a time in which its process was stopped."""
GLOO_TIMEOUT = datetime.timedelta(days=365)
"""Of gloo's collectives while a watchdog keeps their time."""
COLLECTIVE_MARKS = ("gloo", "nccl", "timeout caused pair closure")
"""What a RuntimeError of a collective says, in lower case; gloo raises no type of its own, mostly its source path."""


class CollectiveError(RuntimeError):
    """A collective failed or timed out. One line that names rank and step; the backend's error is the cause."""


def process_group_timeout(backend: str, timeout_seconds: float) -> datetime.timedelta:
    """Return the time-out to give a process group so that whoever can name rank and step ends the run first.

    gloo raises in Python, where rank and step are added, so its time-out is ``timeout_seconds`` and the watchdog waits
    ``GRACE_SECONDS`` longer. NCCL's own watchdog aborts the process from C++, so it waits longer than ours.
    """
    later = 2 * GRACE_SECONDS if backend == "nccl" else 0.0
    return datetime.timedelta(seconds=timeout_seconds + later)


class Watchdog:
    """Watches the steps of one rank from a daemon thread. Use it as a context manager.

    Only the time inside ``step`` is watched, and only since the last ``progress``. A time in which the process was
    stopped (Ctrl-Z, ``scontrol suspend``) does not count: nobody could make progress in it.
    """

    def __init__(
        self,
        rank: int,
        timeout_seconds: float,
        *,
        grace_seconds: float = GRACE_SECONDS,
        first_step_seconds: float = FIRST_STEP_SECONDS,
    ) -> None:
        """Prepare to watch ``rank``.

        Args:
            rank: global rank, for the messages.
            timeout_seconds: time-out of the collectives (``parallel.distributed_timeout_seconds``).
            grace_seconds: what a step may take without progress beyond that before the process is ended.
            first_step_seconds: added to the allowance of the first step that is entered.

        Raises:
            ValueError: a time-out of 0 or less.
        """
        if timeout_seconds <= 0:
            raise ValueError(f"parallel.distributed_timeout_seconds is {timeout_seconds}; it must be above 0")
        self._rank = rank
        self._allowance = timeout_seconds + grace_seconds
        self._grace_seconds = grace_seconds
        self._gloo: dict[dist.ProcessGroup, datetime.timedelta] = {}
        self._first_step_seconds = first_step_seconds
        self._first = True
        self._changed = threading.Condition()
        self._closed = False
        self._step: int | None = None
        self._last_progress = 0.0
        self.deadline = 0.0  # of ``time.monotonic()``: when a step that makes no progress is ended
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._gloo = _gloo_timeouts()
        for group in self._gloo:
            group.set_timeout(GLOO_TIMEOUT)
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for group, timeout in self._gloo.items():
            group.set_timeout(timeout)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch the body as step ``number``; training, validation and saving alike.

        Raises:
            CollectiveError: in place of the error of a collective in the body.
        """
        with self._changed:
            # The deadline is still that of the step before, and may have passed while nothing was watched. The watching
            # thread looks at it as soon as there is a step number: so the new deadline is set first.
            self.progress()
            self._step = number
            self._changed.notify()
        try:
            yield
        except Exception as error:
            if not is_collective_error(error):
                raise
            took = time.monotonic() - self._last_progress
            first_line = next(iter(str(error).splitlines()), "")
            raise CollectiveError(
                f"rank {self._rank}, step {number}: a collective failed after {took:.0f} s without progress "
                f"({type(error).__name__}: {first_line})"
            ) from error
        finally:
            with self._changed:
                self._step = None
                self._first = False

    def progress(self) -> None:
        """Start the allowance of the running step anew, for instance at each micro-batch. Costs next to nothing."""
        self._last_progress = time.monotonic()
        self.deadline = self._last_progress + self._allowance + self._first_step_seconds * self._first

    def _watch(self) -> None:
        cut = False
        with self._changed:
            while not self._closed:
                if self._step is None:
                    self._changed.wait()
                    continue
                before = time.monotonic()
                remaining = self.deadline - before
                if remaining <= 0:
                    self._end_process(self._step)
                if self._gloo and not cut:
                    remaining -= self._grace_seconds
                    if remaining <= 0:
                        # A main thread that waits for a collective gets an error now, and reports it by itself.
                        # One that hangs elsewhere notices nothing: it is ended when the grace is over.
                        cut = True
                        cut_connections()
                        continue
                pulse = min(PULSE_SECONDS, remaining)
                self._changed.wait(pulse)
                stopped = time.monotonic() - before - pulse
                if stopped > PULSE_SECONDS:
                    self._last_progress += stopped
                    self.deadline += stopped

    def _end_process(self, step: int) -> None:
        waited = time.monotonic() - self._last_progress
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame))
        try:
            # The main thread may hang with the console's lock.
            say_at_once(f"rank {self._rank} hung in step {step} for {waited:.0f} s; its main thread is here:\n{stack}")
        finally:
            # No clean-up: whatever would be cleaned up waits for the collective that hangs.
            os._exit(HUNG_EXIT_CODE)


def _gloo_timeouts() -> dict[dist.ProcessGroup, datetime.timedelta]:
    """Return the time-outs of gloo's groups; none where NCCL trains, whose hangs gloo does not see."""
    if not dist.is_initialized() or dist.get_backend() != dist.Backend.GLOO:
        return {}
    groups = [group for group in dist.distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]
    return {group: group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def cut_connections() -> None:
    """Shut this process's TCP connections but that to torchrun's store, so that what waits for them fails."""
    store = int(os.environ.get("MASTER_PORT", "0"))
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status != psutil.CONN_ESTABLISHED or store in (connection.laddr.port, connection.raddr.port):
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)


def is_collective_error(error: BaseException) -> bool:
    """Return whether ``error`` comes from a process group: torch's own types, or gloo's bare RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in COLLECTIVE_MARKS)
