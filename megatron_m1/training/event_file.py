"""TensorBoard's events, written record by record.

Not torch's ``SummaryWriter``: its thread dies with a traceback when the disk refuses, and a part of a record that it
leaves makes the rest of the file unreadable.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_m1.training.record_file import RecordFile


class EventFile:
    """One process's events in a new file of ``folder``.

    Args:
        folder: made if missing.
        start_step: steps after this one that earlier files hold are no longer shown.
        note: as of ``RecordFile``.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, folder: Path, start_step: int, note: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.time()
        name = f"events.out.tfevents.{began:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordFile(folder / name, note)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=began, file_version="brain.Event:2"))
        self.start_after(start_step)

    def start_after(self, step: int) -> None:
        """Have the steps after ``step`` no longer shown that were written so far."""
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of ``step``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is kept and close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
