"""The frame of every conversion: ranks, the working folder and its journal, checks beside the work, the bar.

A conversion to ``OUT`` is made in ``OUT.partial`` and renamed at the end. There every finished file has an entry in
``journal/``, so that a run after a kill goes on where it stopped; an entry is written when its file is on the disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_m1.data.files import write_atomically
from megatron_m1.training.checkpoint_folder import sync

PARTIAL = ".partial"
JOURNAL = "journal"
DESCRIPTION = "conversion.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ConversionError(RuntimeError):
    """A conversion could not be finished. One line; what was finished is kept for the next run."""


def parse_size(text: str) -> int:
    """Read a size such as ``2GB``, ``500MiB`` or ``1000000``, in bytes.

    Raises:
        ValueError: it is none, or 0.
    """
    digits = text.strip().rstrip("BbGgIiKkMm")
    unit = text.strip()[len(digits) :].upper()
    if not digits.isdecimal() or int(digits) == 0 or unit not in _UNITS:
        raise ValueError(f"shard size {text!r}: give a number above 0 and one of KB, MB, GB, KiB, MiB, GiB")
    return int(digits) * _UNITS[unit]


def group_by_size[T](items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Cut ``items`` into runs of at most ``limit`` bytes; what is larger stands alone."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if not groups or size(item) > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size(item)
    return groups


@dataclass(frozen=True)
class Ranks:
    """The processes that share a conversion."""

    rank: int = 0
    size: int = 1

    def gather[T](self, mine: T) -> list[T]:
        """Everyone's value, by rank. Collective; what is awaited is there when it returns."""
        if self.size == 1:
            return [mine]
        from torch import distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, mine)
        return values

    def on_first(self, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0 while the others wait.

        Raises:
            ConversionError: it met an OSError; on every rank.
            ValueError: it raised one; on every rank.
        """
        fault: tuple[str, str] | None = None
        if self.rank == 0:
            try:
                action()
            except OSError as error:
                fault = ("os", _disk_fault(error))
            except ValueError as error:
                fault = ("value", str(error))
        first = self.gather(fault)[0]
        if first is not None:
            raise ConversionError(first[1]) if first[0] == "os" else ValueError(first[1])


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun has started, connected; one where it has not."""
    if "RANK" not in os.environ:
        yield Ranks()
        return
    from torch import distributed as dist

    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of a source: another one is another source."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())}


def _disk_fault(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


class WorkFolder:
    """``OUT.partial`` of a conversion.

    Args:
        out: where the result will be.
        description: what decides the result's bytes, JSON-able; a working folder with another one is begun anew.
        ranks: who works on it.

    Raises:
        ValueError: ``out`` exists already.
        ConversionError: the folder can't be made.
    """

    def __init__(self, out: Path, description: Mapping[str, Any], ranks: Ranks) -> None:
        self.out = out
        self.path = out.with_name(out.name + PARTIAL)
        self._journal = self.path / JOURNAL
        self._ranks = ranks
        text = json.dumps(description, indent=1, sort_keys=True) + "\n"
        ranks.on_first(lambda: self._prepare(text))

    def _prepare(self, text: str) -> None:
        if os.path.lexists(self.out):
            raise ValueError(f"{self.out} exists: choose another folder, or remove it")
        known = self.path / DESCRIPTION
        if self.path.exists() and not (known.is_file() and known.read_text(encoding="utf-8") == text):
            shutil.rmtree(self.path)
        self._journal.mkdir(parents=True, exist_ok=True)
        write_atomically(known, text.encode())

    def entry(self, name: str) -> Any:
        """What was recorded when file ``name`` was finished; None if it is not."""
        path = self._journal / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def record(self, name: str, value: Any) -> None:
        """Note that file ``name`` is finished."""
        write_atomically(self._journal / f"{name}.json", json.dumps(value).encode())

    def forget(self) -> None:
        """Remove everything: the source was not what it seemed. Collective."""
        self._ranks.on_first(lambda: shutil.rmtree(self.path))

    def commit(self, finish: Callable[[], None]) -> None:
        """Run ``finish`` on rank 0, drop the journal and give the folder its name. Collective.

        Raises:
            ConversionError: the disk refuses.
        """

        def rename() -> None:
            finish()
            shutil.rmtree(self._journal)
            (self.path / DESCRIPTION).unlink()
            self.path.rename(self.out)

        self._ranks.on_first(rename)


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

    @property
    def name(self) -> str:
        """Under which it is recorded."""
        return self.path.name


def run_jobs(
    work: WorkFolder,
    jobs: Sequence[Job],
    ranks: Ranks,
    *,
    title: str,
    beside: Callable[[], str | None],
    after: Callable[[str], Any] | None = None,
) -> list[Any]:
    """Do what the journal does not have yet, dealt over the ranks. Collective.

    Args:
        work: where.
        jobs: all files, the same on every rank.
        ranks: who.
        title: of the progress bar, which rank 0 shows for its own share.
        beside: runs in a thread meanwhile: this rank's part of checking the source; a fault in one line, or None.
        after: called in a thread with the name of each file that was written; its value is recorded with the file.

    Returns:
        What is recorded of every job, in order, as ``{"value": ..., "after": ...}``.

    Raises:
        ConversionError: some rank could not write, or the source is damaged; on every rank.
    """
    mine = jobs[ranks.rank :: ranks.size]
    fault: str | None = None
    damage: str | None = None
    total = sum(job.size for job in mine)
    with _one_thread(), ThreadPoolExecutor(2) as pool, _bar(title, total, shown=ranks.rank == 0) as advance:
        checking = pool.submit(beside)
        ends: list[Future[None]] = []

        def end(job: Job, value: Any) -> None:
            # Beside the next file: the disk is as slow as all the rest together.
            sync(job.path)
            work.record(job.name, {"value": value, "after": after(job.name) if after else None})

        try:
            for job in mine:
                if work.entry(job.name) is None:
                    value = job.write()
                    if job.check is not None:
                        job.check()
                    ends.append(pool.submit(end, job, value))
                    _return_free_memory()
                advance(job.size)
                if checking.done() and checking.result() is not None:
                    break
            for pending in ends:
                pending.result()
        except OSError as error:
            fault = (
                f"{work.path} can't be written: {_disk_fault(error)}; make room and run again, it goes on from there"
            )
        except ValueError as error:
            damage = str(error)
        damage = checking.result() or damage
    answers = ranks.gather((damage, fault))
    damaged = [first for first, _ in answers if first is not None]
    if damaged:
        work.forget()
        raise ConversionError(damaged[0])
    failed = [second for _, second in answers if second is not None]
    if failed:
        raise ConversionError(failed[0])
    return [work.entry(job.name) for job in jobs]


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
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
