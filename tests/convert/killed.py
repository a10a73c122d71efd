"""Conversions with small files, and one that dies on the way: imported by the process that is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_m1.convert.export import ExportOptions, export
from megatron_m1.convert.hub_folder import open_hub_folder
from megatron_m1.convert.load_hf import LoadOptions, load_hf
from megatron_m1.convert.our_checkpoint import open_checkpoint
from megatron_m1.convert.work import Ranks

SHARD = 60_000
"""Bytes of a file."""


def start(direction: str, source: Path, out: Path) -> None:
    """Convert with small files, in this process."""
    if direction == "to-hf":
        export(open_checkpoint(source), out, ExportOptions(shard_size=SHARD), Ranks())
    else:
        load_hf(open_hub_folder(source), out, LoadOptions(shard_size=SHARD), Ranks())


def die_after(direction: str, source: Path, out: Path, files: int) -> None:
    """Die of SIGKILL on the way, when so many files are recorded at least."""
    journal = out.with_name(out.name + ".partial") / "journal"
    resolve = open_checkpoint if direction == "to-hf" else open_hub_folder
    opened: Any = resolve(source)
    read, middle = opened.read, opened.units[len(opened.units) // 2]

    def read_or_die(unit: Any) -> Any:
        if unit == middle:
            # A slow disk records files long after they were written: all may be written before any is recorded.
            while len(list(journal.glob("*.json"))) < files:
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(unit)

    opened.read = read_or_die
    if direction == "to-hf":
        export(opened, out, ExportOptions(shard_size=SHARD), Ranks())
    else:
        load_hf(opened, out, LoadOptions(shard_size=SHARD), Ranks())


if __name__ == "__main__":
    die_after(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
