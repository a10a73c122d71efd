"""The frame of every conversion: ranks, and the working folder with its journal. Torch is not imported for it.

A conversion to ``OUT`` is made in ``OUT.partial`` and renamed at the end. There every finished file has an entry in
``journal/``, so that a run after a kill goes on where it stopped; an entry is written when its file is on the disk.
``OUT.partial.lock`` keeps a second conversion out.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from megatron_m1.files import file_lock, read_json_object, refuse_overwriting, sync, write_atomically

PARTIAL = ".partial"
LOCK = ".lock"
JOURNAL = "journal"
DESCRIPTION = "conversion.json"
PATIENCE = timedelta(days=7)
"""That ranks have for each other: one may have hours of work more, as after a kill. One that dies closes its
connections, which ends the others at once."""


class ConversionError(RuntimeError):
    """A conversion could not be finished. One line; what was finished is kept for the next run."""


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
                fault = ("os", disk_refusal(place, error))
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


def disk_refusal(place: Path, error: OSError) -> str:
    """Say in one line that ``place`` could not be written, and what to do."""
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
