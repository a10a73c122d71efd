"""Records on a disk that is full for a while: none is torn, all come in their order, and what is lost is said."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.config.tree import RunConfig
from megatron_m1.training.figures import Figure
from megatron_m1.training.metrics import MetricsLog
from megatron_m1.training.record_file import RecordFile
from tests.checkpoint.checkpoint_runs import file_size_limit


def record(number: int) -> bytes:
    return f"record {number}\n".encode()


def test_kept_records_come_later_and_none_is_torn(tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "records"
    file = RecordFile(path, notes.append)
    file.write(record(1))
    with file_size_limit(15):
        for number in range(2, 6):
            file.write(record(number))
            assert path.read_bytes() == record(1), "a part of the second had room"
    assert notes == [f"{path} can't be written: File too large: training goes on, its records are kept and tried again"]
    file.write(record(6))
    assert path.read_bytes() == b"".join(map(record, range(1, 7)))
    assert notes[1:] == [f"{path} is written again"]
    with file_size_limit(path.stat().st_size + 3):
        file.write(record(7))
        file.close()
    assert path.read_bytes() == b"".join(map(record, range(1, 7)))
    assert len(notes) == 4 and notes[3] == f"{path} lacks 1 record: File too large"


def test_no_more_is_kept_than_asked_for(tmp_path: Path) -> None:
    notes: list[str] = []
    file = RecordFile(tmp_path / "records", notes.append, most_kept=3)
    with file_size_limit(0):
        for number in range(1, 9):
            file.write(record(number))
    file.write(record(9))
    file.close()
    assert (tmp_path / "records").read_bytes() == b"".join(map(record, (1, 2, 3, 9)))
    assert notes[1:] == [f"{tmp_path / 'records'} is written again, lost: 5 records"]


def test_a_folder_that_goes_and_comes_back(tmp_path: Path) -> None:
    """As a network's disk does: the open file is of no use any more."""
    notes: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    file = RecordFile(folder / "records", notes.append)
    file.write(record(1))
    with file_size_limit(0):
        folder.rename(tmp_path / "away")
        file.write(record(2))
    file.write(record(3))
    (tmp_path / "away").rename(folder)
    file.write(record(4))
    file.close()
    assert (folder / "records").read_bytes() == b"".join(map(record, range(1, 5)))
    assert len(notes) == 2


LOSS = Figure("loss", "loss {:.4f}")


def test_the_log_of_a_run(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    with MetricsLog(tmp_path, RunConfig(), start_step=0, total_steps=9, console=console) as log:
        for step in range(1, 4):
            log.log_step(step, {LOSS: 1.0})
        with file_size_limit(100):
            for step in range(4, 9):
                log.log_step(step, {LOSS: 1.0})
        log.log_step(9, {LOSS: 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))
    assert isinstance(console.file, io.StringIO)
    said = [line for line in console.file.getvalue().splitlines() if not line.startswith("step")]
    assert len(said) == 4
    for name in ("metrics.jsonl can't be written: File too large", "metrics.jsonl is written again"):
        assert sum(name in line for line in said) == 1
