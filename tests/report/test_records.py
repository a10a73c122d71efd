"""metrics.jsonl as a report reads it: once, on and on, damaged, and of any length."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.report.records import MOST_FIGURES, RunRecords
from megatron_m1.report.series import Series


def write(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "tokens": 10 * number, "loss": 1.0 / number} | more


def points(series: Series) -> list[tuple[int, float]]:
    x, y = series.extremes(1024)
    return list(zip(x.tolist(), y.tolist(), strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_figures_come_by_name_whatever_they_are(path: Path) -> None:
    write(path, step(1), step(2, unheard_of=7, by_source={"code": 3.5}, word="x", flag=True))
    write(path, {"step": 2, "validation_loss": 4.0}, step(3, loss=None))
    records = RunRecords(path)
    assert records.read() and not records.read()
    assert {name: points(series) for name, series in records.figures.items() if name != "tokens"} == {
        "loss": [(1, 1.0), (2, 0.5)],
        "unheard_of": [(2, 7.0)],
        "by_source/code": [(2, 3.5)],
        "validation_loss": [(2, 4.0)],
    }
    assert (records.last_step, records.tokens, records.unreadable) == (3, 30, 0)


def test_what_happened_is_read_from_the_steps(path: Path) -> None:
    write(path, step(1, stage="a", skipped_steps=0, memory_peak_gib=2.0))
    write(path, step(2, stage="a", skipped_steps=1, memory_peak_gib=3.0), step(3, stage="b", skipped_steps=1))
    # After a save; of another process, by the memory that it has never held.
    write(path, step(4, stage="b", skipped_steps=3, save_seconds=1.5), step(5, memory_peak_gib=2.5))
    # A file that no run has rewound.
    write(path, step(5, memory_peak_gib=2.5))
    records = RunRecords(path)
    records.read()
    assert records.stages == [(1, "a"), (3, "b")]
    assert points(records.skipped) == [(2, 1.0), (4, 1.0)]
    assert points(records.saves) == [(3, 1.5)]
    assert records.restarts == [4, 4]


def test_reading_goes_on_where_it_ended(path: Path) -> None:
    write(path, step(1), step(2))
    with path.open("a") as file:
        file.write('{"step": 3, "tok')
    records = RunRecords(path)
    assert records.read() and records.last_step == 2
    with path.open("a") as file:
        file.write('ens": 30, "loss": 0.1}\n')
    assert records.read() and records.last_step == 3 and records.unreadable == 0
    assert [x for x, _ in points(records.figures["loss"])] == [1, 2, 3]


def test_a_file_that_was_rewound_is_read_again(path: Path) -> None:
    write(path, *(step(number) for number in range(1, 7)))
    records = RunRecords(path)
    records.read()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    write(path, *(step(number, loss=9.0) for number in range(3, 9)))
    assert records.read()
    assert points(records.figures["loss"]) == [(1, 1.0), (2, 0.5), *((number, 9.0) for number in range(3, 9))]


def test_lines_that_are_no_records_are_counted(path: Path) -> None:
    write(path, step(1))
    odd = [b"", b"[]", b'{"step": "1"}', b'{"step": -1}', b"\xff\xfe", b"[" * 100_000, b'{"step": 1e99}', b"9" * 5000]
    path.write_bytes(path.read_bytes() + b"\n".join(odd) + b"\n" + b'{"step": 2, "loss": Infinity, "lr": 1e400}\n')
    write(path, step(3, loss=10**400, lr=2))
    records = RunRecords(path)
    records.read()
    assert records.unreadable == len(odd)
    assert points(records.figures["loss"]) == [(1, 1.0)] and points(records.figures["lr"]) == [(3, 2.0)]


def test_figures_without_end_do_not_fill_the_memory(path: Path) -> None:
    write(path, *({"step": number, f"figure_{number}": 1.0} for number in range(MOST_FIGURES + 5)))
    records = RunRecords(path)
    records.read()
    assert len(records.figures) == MOST_FIGURES and records.left_out == 5


def test_what_can_not_be_read_is_one_line(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ValueError, match=r"metrics\.jsonl can't be read: Is a directory"):
        RunRecords(path).read()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(path: Path) -> None:
    peaks = []
    for steps in (10_000, 40_000):
        path.write_text("".join(f'{{"step": {n}, "tokens": 1, "loss": {n / 7}}}\n' for n in range(1, steps + 1)))
        tracemalloc.start()
        RunRecords(path).read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]
