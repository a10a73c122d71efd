"""A pool of worker processes that are kept between calls.

Importing torch and megatron-core costs ten seconds of processor time, so that it is done once, in a server from which
the workers are forked.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_m1.runtime.pool.messages import RELEASE, Answer, Call
from megatron_m1.runtime.pool.worker import STACK_SIGNAL, serve

MAX_WORLD_SIZE = 8
FAILURE_GRACE = 5.0
"""Seconds that the other ranks have for their own answer after one rank failed; most wait in a collective for it."""
MOST_THREADS = 40
"""Threads with which a worker is replaced by a fresh one after a call.

gloo runs three threads a group, a hundred wake-ups a second each, and some groups of megatron-core's outlive their
destruction: a worker that kept them would slow down all later calls. A fork costs a tenth of a second.
"""
STACK_WAIT = 3.0
"""Seconds for a stuck worker to write its stacks."""


class Worker:
    """One process of the pool and the pipe to it."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.stack_path = folder / f"stack_{rank}_{time.monotonic_ns()}.txt"
        context = multiprocessing.get_context("forkserver")
        self.connection: Connection
        self.connection, far_end = context.Pipe()
        # Not a daemon: those may have no children, and dist_checkpointing starts some.
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(far_end, rank, str(self.stack_path)), name=f"worker-{rank}"
        )
        self.process.start()
        far_end.close()

    def stacks(self) -> str:
        """The Python stacks of all its threads, as far as it still can write them."""
        if self.process.pid is None or not self.process.is_alive():
            return f"(ended with exit code {self.process.exitcode})"
        os.kill(self.process.pid, STACK_SIGNAL)
        deadline = time.monotonic() + STACK_WAIT
        text, previous = "", None
        while time.monotonic() < deadline and (not text or text != previous):
            time.sleep(0.1)
            previous, text = text, self.stack_path.read_text() if self.stack_path.exists() else ""
        return text or "(no stack: it had not started yet)"

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def join(self) -> None:
        """Wait for the process, which ends by itself once its connection is closed, or end it after a while."""
        self.process.join(timeout=5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class WorkerPool:
    """Runs functions on ranks. Workers start when a call first needs them; worker i is rank i of every call.

    Args:
        preloaded: modules that are imported once, before the workers are forked.
    """

    def __init__(self, preloaded: Sequence[str]) -> None:
        multiprocessing.set_forkserver_preload(list(preloaded))
        self._workers: list[Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megatron_m1_workers_")

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        world_size: int = 4,
        timeout: float = 240.0,
        process_group: bool = True,
    ) -> list[Any]:
        """Run ``function(rank, world_size, *arguments)`` on every rank inside a fresh gloo process group.

        Rank, world size and rendezvous address are in the environment as under torchrun. The default group and
        megatron-core's parallel state are destroyed afterwards, torch, numpy and random are seeded with 0 before.

        Args:
            function: top-level function of an importable module.
            arguments: picklable; every rank gets its own copy.
            world_size: number of ranks, 1 to 8.
            timeout: seconds for the whole call, the start of new workers included.
            process_group: False leaves ``init_process_group`` to the function, which finds torchrun's environment.

        Returns:
            What each rank returned, in rank order.

        Raises:
            TimeoutError: some ranks did not answer in time; names them and shows their stacks. They are replaced.
            Exception: what the first failing rank raised, with its rank and traceback as a note.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size is {world_size}; the pool runs 1 to {MAX_WORLD_SIZE} ranks")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        call = Call(function, arguments, world_size, store.port, timeout, process_group)
        payload = pickle.dumps((list(sys.path), pickle.dumps(call)))
        while len(self._workers) < world_size:
            self._workers.append(Worker(len(self._workers), Path(self._folder.name)))
        for worker in self._workers[:world_size]:
            worker.connection.send_bytes(payload)
        answers = self._collect(world_size, timeout)
        return self._results(answers, world_size, timeout)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.join()
        self._workers.clear()
        self._folder.cleanup()

    def _collect(self, world_size: int, timeout: float) -> dict[int, Answer]:
        """Answers by rank in the order of arrival, until all are there, or too late, or too long after a failure."""
        waiting = {self._workers[rank].connection: rank for rank in range(world_size)}
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for connection in multiprocessing.connection.wait(list(waiting), remaining):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = answer = self._receive(rank)
                if answer.error is not None:
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
        for rank, answer in answers.items():
            if answer.error is None:
                self._workers[rank].connection.send_bytes(RELEASE)
        return answers

    def _receive(self, rank: int) -> Answer:
        worker = self._workers[rank]
        try:
            answer: Answer = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            worker.process.join()
            error = RuntimeError(f"the process of rank {rank} ended with exit code {worker.process.exitcode}")
            return Answer(error=pickle.dumps(error))
        if answer.error is not None:
            # It leaves the group at once, so that ranks that wait for it fail instead of hanging.
            worker.connection.send_bytes(RELEASE)
        return answer

    def _results(self, answers: dict[int, Answer], world_size: int, timeout: float) -> list[Any]:
        missing = [rank for rank in range(world_size) if rank not in answers]
        stuck = "".join(f"\n--- rank {rank} did not answer:\n{self._workers[rank].stacks()}" for rank in missing)
        for rank in range(world_size):
            dead = rank in missing or not self._workers[rank].process.is_alive()
            if dead or answers[rank].threads > MOST_THREADS:
                self._workers[rank].kill()
                self._workers[rank] = Worker(rank, Path(self._folder.name))
        failures = [(rank, answer) for rank, answer in answers.items() if answer.error is not None]
        if failures:
            rank, answer = failures[0]
            error: BaseException = pickle.loads(answer.error or b"")
            others = "".join(
                f"\n--- rank {r} failed after it: {pickle.loads(a.error or b'')!r}" for r, a in failures[1:]
            )
            error.add_note(f"--- rank {rank} of {world_size}:\n{answer.traceback}{others}{stuck}")
            raise error
        if missing:
            raise TimeoutError(f"ranks {missing} of {world_size} did not answer within {timeout:g} s{stuck}")
        return [pickle.loads(answers[rank].value or b"") for rank in range(world_size)]
