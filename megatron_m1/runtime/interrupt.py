"""A request to save and stop, on which all ranks act at the same step: SIGTERM, SLURM's SIGUSR1, a hang-up, Ctrl-C.

Not ``megatron.training.dist_signal_handler``: it watches one signal, always asks the whole world, knows no mixed
backend, and its package imports the rest of ``megatron.training``, which takes longer than a short run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_m1.launch import FORWARDED, SAME_PRESS_SECONDS, SECOND_INTERRUPT, worker_world_size

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


class Interrupt:
    """Notes SIGTERM, SIGUSR1, SIGHUP and SIGINT while it is entered, and gives the earlier handlers back on exit.

    A second SIGINT ends a process that nobody launched at once: somebody at a terminal is in a hurry. A worker leaves
    that to its launcher: it may get one from the launcher and one as every process of the job (``scancel -s INT``).
    A SIGHUP that was ignored before (``nohup``) stays so.

    Enter it in the main thread, the only one where Python installs handlers (ValueError elsewhere).

    Attributes:
        received: name of the first signal that reached this process, None so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._earlier: dict[signal.Signals, Handler] = {}
        self._is_worker = worker_world_size(os.environ) is not None
        self._interrupted_at = 0.0

    def __enter__(self) -> Interrupt:
        for number in FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            # None stands for a handler that was not installed from Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def should_stop(self, group: dist.ProcessGroup | None = None) -> str | None:
        """Name of the signal that any rank of ``group`` got, None if none did: the same answer on all. A collective.

        Args:
            group: None is the default group; without an initialised default group only this process counts.
        """
        number = _largest(signal.Signals[self.received] if self.received else 0, group)
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._is_worker:
            if self._interrupted_at and time.monotonic() - self._interrupted_at > SAME_PRESS_SECONDS:
                # Straight to the descriptor: the main thread may be printing just now.
                with suppress(OSError):
                    os.write(2, f"{SECOND_INTERRUPT}\n".encode())
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._interrupted_at = self._interrupted_at or time.monotonic()
        # Assignments only: code that logs or locks here could meet itself in the interrupted main thread.
        self.received = self.received or signal.Signals(number).name
