"""A profiler window: torch.profiler over some steps, one Chrome trace per rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_m1.files import partial_path, put_in_place, refusal


class ProfilerWindow:
    """Profiles the steps ``start`` to ``end - 1``.

    Writes ``<folder>/profile/steps_<first>_to_<last>_rank_<rank>.json``, complete or not at all. A run that
    resumes inside the window profiles what is left of it. Open it with Perfetto or chrome://tracing.
    """

    def __init__(
        self, folder: Path, *, rank: int, start: int | None, end: int | None, note: Callable[[str], None] = print
    ) -> None:
        """Prepare the window of one rank.

        Args:
            folder: the run's folder.
            rank: global rank, for the file's name.
            start: first step (``train.profile_step_start``), None profiles nothing.
            end: step after the last (``train.profile_step_end``).
            note: called with one line when the trace can't be written, and on rank 0 when it is.

        Raises:
            ValueError: only one of both is given, or the window is empty.
        """
        if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start < end):
            raise ValueError(
                f"train.profile_step_start is {start} and train.profile_step_end is {end}; "
                f"give both, with 0 <= start < end, or none"
            )
        self._folder = folder / "profile"
        self._rank = rank
        self._note = note
        self._steps = range(0) if start is None or end is None else range(start, end)
        self._profiler: profile | None = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the body if step ``number`` lies in the window; write the trace after the last step of it."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._start(number)
        self._last = number
        yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what was profiled so far, for a run that ends inside the window. Does nothing otherwise.

        A disk that refuses is said, and no more.
        """
        if self._profiler is None:
            return
        if torch.cuda.is_available():
            # Kernels that are still queued belong to the profiled steps.
            torch.cuda.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        target = self._folder / f"steps_{self._first}_to_{self._last}_rank_{self._rank}.json"
        part = partial_path(target)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(part))
            put_in_place(part, target)
            if self._rank == 0:
                steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
                self._note(f"profile of {steps} written to {target} (one a rank)")
        except (OSError, RuntimeError) as error:
            # On one rank alone: the others would wait for it.
            self._note(f"{target} can't be written: {refusal(error, self._folder)}")

    def _start(self, number: int) -> None:
        # Kineto tells of its own workings, and calls a machine without GPUs an error; who wants that sets a level.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first = number
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()
