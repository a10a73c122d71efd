"""A request to save and stop, on which all ranks act at the same step: SIGTERM, SLURM's SIGUSR1, a hang-up, Ctrl-C.

Not ``megatron.training.dist_signal_handler``: it watches one signal, always asks the whole world, knows no mixed
backend, and its package imports the rest of ``megatron.training``, which takes longer than a short run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_m1.launch import FORWARDED, SAME_PRESS_SECONDS, SECOND_INTERRUPT, worker_world_size
from megatron_m1.printing import say_at_once

Handler = Callable[[int, FrameType | None], object] | int | None


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether ``flag`` is set on any rank of ``group``. A collective: every rank of the group must call it.

    Args:
        flag: this rank's own.
        group: None is the default group; without an initialised default group the answer is ``flag``.
    """
    return bool(_largest(int(flag), group))


def _largest(value: int, group: dist.ProcessGroup | None) -> int:
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
    votes = torch.tensor([value], dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group)
    return int(votes.item())


def _say_nothing(line: str) -> None:
    pass


class Interrupt:
    """Notes SIGTERM, SIGUSR1, SIGHUP and SIGINT while it is entered, and gives the earlier handlers back on exit.

    The first of them is answered at once, by a thread: the main one may be in the middle of a long step. A second
    SIGINT ends a process that nobody launched at once: somebody at a terminal is in a hurry. A worker leaves that to
    its launcher: it may get one from the launcher and one as every process of the job (``scancel -s INT``). A SIGHUP
    that was ignored before (``nohup``) stays so.

    Enter it in the main thread, the only one where Python installs handlers (ValueError elsewhere).

    Args:
        say: shows the answer; called in a thread of its own.

    Attributes:
        received: name of the first signal that reached this process, None so far.
        promise: what the answer says will happen; who trains keeps it true.
    """

    def __init__(self, say: Callable[[str], None] = _say_nothing) -> None:
        self.received: str | None = None
        self.promise = "finishing the first step, then saving"
        self._say = say
        self._earlier: dict[signal.Signals, Handler] = {}
        self._earlier_wakeup = -1
        self._is_worker = worker_world_size(os.environ) is not None
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="interrupt", daemon=True)

    def __enter__(self) -> Interrupt:
        for number in FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._note)
        # Python's own handlers wait for the main thread; this is written as a signal arrives.
        self._earlier_wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._earlier_wakeup)
        self._told.close()
        self._thread.join()
        self._heard.close()
        for number, handler in self._earlier.items():
            # None stands for a handler that was not installed from Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def should_stop(self, group: dist.ProcessGroup | None = None, *, promise: str | None = None) -> str | None:
        """Name of the signal that any rank of ``group`` got, None if none did: the same answer on all. A collective.

        Args:
            group: None is the default group; without an initialised default group only this process counts.
            promise: the attribute's value for signals that come too late for this vote; None keeps it.
        """
        earlier, self.promise = self.promise, "finishing the step, then saving"
        # For one that comes during the vote, ranks that have not voted yet decide which step that is.
        number = _largest(signal.Signals[self.received] if self.received else 0, group)
        if not number:
            self.promise = promise or earlier
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Assignments only: code that logs or locks here could meet itself in the interrupted main thread.
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        """Answer the first signal, and leave at a second SIGINT."""
        is_answered = is_pressed = False
        while numbers := self._heard.recv(64):
            heeded = [number for number in numbers if number in FORWARDED]
            if heeded and not is_answered:
                is_answered = True
                self._say(f"{signal.Signals(heeded[0]).name}: {self.promise}")
            if signal.SIGINT in heeded and not self._is_worker:
                if is_pressed:
                    _leave()
                is_pressed = True
                # What comes until then is the same press.
                time.sleep(SAME_PRESS_SECONDS)
                with suppress(BlockingIOError):
                    self._heard.recv(4096, socket.MSG_DONTWAIT)


def _leave() -> None:
    """Die of SIGINT, from any thread."""
    say_at_once(SECOND_INTERRUPT)
    # Python itself changes what a signal does in the main thread alone, which may be busy for long.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGINT, None)  # SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)
