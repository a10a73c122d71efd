"""The files of a conversion, written one after another: dealt over the ranks, with checks beside the work and a bar."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_m1.convert.work import ConversionError, Ranks, WorkFolder, disk_refusal
from megatron_m1.files import sync


@dataclass(frozen=True)
class Job:
    """One file of a conversion."""

    path: Path
    size: int
    """Bytes, about."""
    write: Callable[[], Any]
    """Write it; what it returns is recorded. ``run_jobs`` brings it to the disk."""
    check: Callable[[], None] | None = None
    """Compare it with the source (``--verify``); raises ValueError."""


def run_jobs(
    work: WorkFolder,
    jobs: Sequence[Job],
    ranks: Ranks,
    *,
    title: str,
    beside: Callable[[Event], str | None],
    after: Callable[[str], Any] | None = None,
) -> list[Any]:
    """Do what the journal does not have yet, dealt over the ranks. Collective.

    Args:
        work: where.
        jobs: all files, the same on every rank.
        ranks: who.
        title: of the progress bar, which rank 0 shows for its own share.
        beside: runs in a thread meanwhile: this rank's part of checking the source; a fault in one line, or None. Its
            argument is set when the work has failed and nobody waits for the answer.
        after: called in a thread with the name of each file that was written; its value is recorded with the file.

    Returns:
        What is recorded of every job, in order, as ``{"value": ..., "after": ...}``.

    Raises:
        ConversionError: some rank could not write, or the source is damaged; on every rank.
    """
    mine = jobs[ranks.rank :: ranks.size]
    fault: str | None = None
    damage: str | None = None
    failed = Event()
    with _one_thread(), ThreadPoolExecutor(2) as pool, _bar(title, mine, shown=ranks.rank == 0) as advance:
        checking = pool.submit(beside, failed)
        ends: list[Future[None]] = []
        try:
            for job in mine:
                is_new = work.entry(job.path) is None
                value = job.write() if is_new else None
                if job.check is not None:
                    job.check()
                if is_new:
                    # Beside the next file: the disk is as slow as all the rest together.
                    ends.append(pool.submit(_record, work, job, value, after))
                _return_free_memory()
                advance(job.size)
                if checking.done() and checking.result() is not None:
                    break
            for pending in ends:
                pending.result()
        except OSError as error:
            failed.set()
            fault = disk_refusal(work.path, error)
        except ValueError as error:
            damage = str(error)
        except BaseException:
            failed.set()
            raise
        damage = checking.result() or damage
    _raise_together(work, ranks, damage, fault)
    return [work.entry(job.path) for job in jobs]


def _record(work: WorkFolder, job: Job, value: Any, after: Callable[[str], Any] | None) -> None:
    sync(job.path)
    work.record(job.path, {"value": value, "after": after(job.path.name) if after else None})


def _raise_together(work: WorkFolder, ranks: Ranks, damage: str | None, fault: str | None) -> None:
    """Raise on every rank what some rank met: damage first, with which nothing that was written is worth keeping."""
    answers = ranks.gather((damage, fault))
    damaged = [first for first, _ in answers if first is not None]
    if damaged:
        work.forget()
        raise ConversionError(damaged[0])
    refused = [second for _, second in answers if second is not None]
    if refused:
        raise ConversionError(refused[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    # Copies are as fast as memory with one; more would take turns with the threads that hash.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _return_free_memory() -> None:
    # glibc keeps freed blocks, and tensors of alternating sizes leave holes in them: a third of a model in all.
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextmanager
def _bar(title: str, jobs: Sequence[Job], *, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)) as bar:
        # A process that is killed could not show it again.
        bar.console.show_cursor(True)
        task = bar.add_task(title, total=sum(job.size for job in jobs))
        yield lambda size: bar.advance(task, size)
