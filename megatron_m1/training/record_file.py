"""A file of records that only grows, on a disk that may refuse for a while."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_m1.printing import counted

MOST_KEPT = 10_000
"""Records kept in memory while they can't be written: some megabytes."""


class RecordFile:
    """Appends records. What can't be written is kept and tried again with the next one; a record is whole or absent.

    Args:
        path: the file; made if missing.
        note: called with one line when the disk refuses, when it takes records again, and for what is lost.
        most_kept: records kept in memory; further ones are lost.

    Raises:
        OSError: the file can't be opened.
    """

    def __init__(self, path: Path, note: Callable[[str], None], *, most_kept: int = MOST_KEPT) -> None:
        self._path = path
        self._note = note
        self._most_kept = most_kept
        self._kept: deque[bytes] = deque()
        self._lost = 0
        self._reason: str | None = None
        self._end = path.stat().st_size if path.exists() else 0
        self._descriptor: int | None = None
        self._open()

    def write(self, record: bytes) -> None:
        """Append ``record``, after those that are still kept."""
        if len(self._kept) >= self._most_kept:
            self._write_kept()
        if len(self._kept) >= self._most_kept:
            self._lost += 1
            return
        self._kept.append(record)
        self._write_kept()

    def try_again(self) -> None:
        """Write what is kept, if anything is: for files whose next record may be long in coming."""
        if self._kept:
            self._write_kept()

    def close(self) -> None:
        """Write what is kept, if the disk takes it now, and close."""
        self.try_again()
        self._close()
        if self._reason is not None:
            self._note(f"{self._path} lacks {counted(len(self._kept) + self._lost, 'record')}: {self._reason}")

    def _write_kept(self) -> None:
        try:
            self._open()
            self._append(b"".join(self._kept))
        except OSError as error:
            # A file of a network's disk may have become useless, so the next attempt opens it anew.
            self._close()
            if self._reason is None:
                self._note(
                    f"{self._path} can't be written: {error.strerror}: training goes on, its records are kept and "
                    "tried again"
                )
            self._reason = error.strerror
            return
        self._kept.clear()
        if self._reason is not None:
            lost = f", lost: {counted(self._lost, 'record')}" if self._lost else ""
            self._note(f"{self._path} is written again{lost}")
            self._reason, self._lost = None, 0

    def _open(self) -> None:
        if self._descriptor is not None:
            return
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._descriptor).st_size
        if size > self._end:
            # The rest of a record that was written in part only.
            os.ftruncate(self._descriptor, self._end)
        self._end = min(size, self._end)

    def _append(self, content: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(content)

    def _close(self) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):
            os.close(descriptor)
