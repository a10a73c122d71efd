"""The frame of every conversion: ranks, the working folder and its journal, checks beside the work, the bar.

A conversion to ``OUT`` is made in ``OUT.partial`` and renamed at the end. There every finished file has an entry in
``journal/``, so that a run after a kill goes on where it stopped; an entry is written when its file is on the disk.
``OUT.partial.lock`` keeps a second conversion out.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from threading import Event
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_m1.files import file_lock, read_json_object, refuse_overwriting, sync, write_atomically

PARTIAL = ".partial"
LOCK = ".lock"
JOURNAL = "journal"
DESCRIPTION = "conversion.json"
PATIENCE = timedelta(days=7)
"""That ranks have for each other: one may have hours of work more, as after a kill. One that dies closes its
connections, which ends the others at once."""
_UNITS = {
    "": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}


class ConversionError(RuntimeError):
    """A conversion could not be finished. One line; what was finished is kept for the next run."""


def parse_size(text: str) -> int:
    """Read a size such as ``2GB``, ``500MiB`` or ``1000000``, in bytes.

    Raises:
        ValueError: it is none, or 0.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text.strip().lower())
    size = int(Decimal(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size == 0:
        raise ValueError(f"shard size {text!r}: give a number above 0 and one of KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    return size


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

    def on_first(self, action: Callable[[], None], place: Path) -> None:
        """Run ``action``, which writes to ``place``, on rank 0 while the others wait.

        Raises:
            ConversionError: it met an OSError; on every rank.
            ValueError: it raised one; on every rank.
        """
        fault: tuple[str, str] | None = None
        if self.rank == 0:
            try:
                action()
            except OSError as error:
                fault = ("os", _refusal(place, error))
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

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of a source: another one is another source."""
    # Folders are no part of it, nor is the lock of a result that is made within it; a link may lead nowhere.
    there = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != LOCK]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in there}


def _disk_fault(error: OSError) -> str:
    # A rename or a copy names two files; the one that the disk refused is the second, which was being written.
    place = error.filename2 or error.filename
    place = f"{place}: " if place else ""
    return f"{place}{error.strerror or error}"


def refuse_existing(out: Path) -> None:
    """Check that nothing has the result's name.

    Raises:
        ValueError: something has.
    """
    if os.path.lexists(os.path.abspath(out)):
        raise ValueError(f"{out} exists: choose another folder, or remove it")


def _refusal(place: Path, error: OSError) -> str:
    return f"{place} can't be written: {_disk_fault(error)}; make room and run again, it goes on from there"


class WorkFolder:
    """``OUT.partial`` of a conversion, as a context manager: while it is entered, it is nobody else's.

    Args:
        out: where the result will be.
        description: what decides the result's bytes, JSON-able; a working folder with another one is begun anew.
        ranks: who works on it.
        reads: files and folders that the conversion reads.

    Raises:
        ValueError: on entering: ``out`` exists already, can't be made, or is being made by others; or what has the
            working folder's name is none, or is read.
        ConversionError: on entering: the disk refuses.
    """

    def __init__(self, out: Path, description: Mapping[str, Any], ranks: Ranks, *, reads: Sequence[Path] = ()) -> None:
        self.out = out
        self._reads = reads
        # The ending goes to the absolute path, as text: ``.`` and ``..`` have no name that could take one.
        self.path = Path(os.path.abspath(out) + PARTIAL)
        self._journal = self.path / JOURNAL
        self._ranks = ranks
        self._text = json.dumps(description, indent=1, sort_keys=True) + "\n"
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._ranks.on_first(lambda: self._prepare(held), self.path)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _prepare(self, held: ExitStack) -> None:
        refuse_existing(self.out)
        # It may be what an earlier conversion left, and still be the source of this one.
        refuse_overwriting([self.path], self._reads)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(file_lock(Path(f"{self.path}{LOCK}"), wait=False))
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {self.path}: wait for it, or choose another OUT") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(f"{self.out} can't be made: {_disk_fault(error)}; choose another OUT") from error
        # Asked again under the lock: another process may have finished this result since the first look.
        refuse_existing(self.out)
        known = self.path / DESCRIPTION
        is_ours = not self.path.is_symlink() and (known.is_file() or self._is_empty())
        if os.path.lexists(self.path) and not is_ours:
            raise ValueError(f"{self.path} is there, and not by a conversion: move it, or choose another OUT")
        if not known.is_file() or known.read_bytes() != self._text.encode():
            self._clear()
            self.path.mkdir(exist_ok=True)
            write_atomically(known, self._text.encode())
        self._journal.mkdir(exist_ok=True)

    def _is_empty(self) -> bool:
        """Whether it has nothing but, perhaps, what is left of a description that was being written."""
        return self.path.is_dir() and all(path.name.startswith(f".{DESCRIPTION}.") for path in self.path.iterdir())

    def _clear(self) -> None:
        """Remove all but the description, by which a later run knows what it may remove."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != DESCRIPTION:
                path.unlink()

    def entry(self, file: Path) -> Any:
        """What was recorded when ``file`` was finished; None if it is not, or has another size, or nothing tells."""
        with suppress(OSError, ValueError):
            entry = read_json_object(self._journal / f"{file.name}.json")
            if isinstance(entry.get("of"), dict) and entry["of"].keys() == {"value", "after"}:
                return entry["of"] if entry.get("size") == file.stat().st_size else None
        return None

    def record(self, file: Path, value: Any) -> None:
        """Note that ``file`` is finished."""
        entry = {"of": value, "size": file.stat().st_size}
        write_atomically(self._journal / f"{file.name}.json", json.dumps(entry).encode())

    def keep_only(self, names: Collection[str]) -> None:
        """Remove files other than these: what an earlier attempt wrote at its end may not be what this one would."""
        for path in self.path.iterdir():
            if path.is_file() and path.name not in {*names, DESCRIPTION}:
                path.unlink()

    def on_first(self, action: Callable[[], None]) -> None:
        """Run ``action``, which writes here, on rank 0 while the others wait. Raises as ``Ranks.on_first``."""
        self._ranks.on_first(action, self.path)

    def forget(self) -> None:
        """Remove everything: the source was not what it seemed. Collective."""

        def remove() -> None:
            self._clear()
            (self.path / DESCRIPTION).unlink()
            self.path.rmdir()

        self.on_first(remove)

    def commit(self, finish: Callable[[], None]) -> None:
        """Run ``finish`` on rank 0, drop the journal and give the folder its name. Collective.

        Raises:
            ConversionError: the disk refuses.
        """

        def rename() -> None:
            finish()
            for torn in self.path.rglob(".*.partial"):
                torn.unlink()  # a write that was killed left it under this temporary name
            for path in self.path.rglob("*"):
                sync(path)
            sync(self.path)
            # First of all: without its journal, a folder that still had the old name would be begun anew.
            self.path.rename(self.out)
            shutil.rmtree(self.out / JOURNAL, ignore_errors=True)
            with suppress(OSError):
                (self.out / DESCRIPTION).unlink()
            sync(self.out.absolute().parent)

        self.on_first(rename)


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
    total = sum(job.size for job in mine)
    failed = Event()
    with _one_thread(), ThreadPoolExecutor(2) as pool, _bar(title, total, shown=ranks.rank == 0) as advance:
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
            fault = _refusal(work.path, error)
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
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
