"""Which steps a profiler window covers, and what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from megatron_m1.training.profile import ProfilerWindow


def run(window: ProfilerWindow, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with window.step(step), record_function(f"marked step {step}"):
            torch.ones(3, 3) @ torch.ones(3, 3)


def marked_steps(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name")).startswith("marked step")})


@pytest.mark.parametrize(
    ("first", "last", "name", "steps"),
    [
        (1, 6, "steps_3_to_4_rank_5.json", ["marked step 3", "marked step 4"]),
        (4, 6, "steps_4_to_4_rank_5.json", ["marked step 4"]),
        (1, 3, "steps_3_to_3_rank_5.json", ["marked step 3"]),
    ],
    ids=["whole", "resumed inside", "ended inside"],
)
def test_window(tmp_path: Path, first: int, last: int, name: str, steps: list[str]) -> None:
    window = ProfilerWindow(tmp_path, rank=5, start=3, end=5)
    run(window, first, last)
    window.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == name
    assert marked_steps(path) == steps


def test_rank_zero_says_where_the_trace_is_and_torch_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        notes: list[str] = []
        window = ProfilerWindow(tmp_path, rank=rank, start=1, end=3, note=notes.append)
        run(window, 1, 3)
        path = tmp_path / "profile" / f"steps_1_to_2_rank_{rank}.json"
        assert path.exists()
        assert notes == ([f"profile of steps 1 to 2 written to {path} (one a rank)"] if rank == 0 else [])
    # Nor on the descriptors, where Kineto writes by itself.
    assert capfd.readouterr() == ("", "")


def test_nothing_outside_the_window(tmp_path: Path) -> None:
    for start, end in ((None, None), (10, 11)):
        window = ProfilerWindow(tmp_path, rank=0, start=start, end=end)
        run(window, 1, 2)
        window.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start", "end"), [(3, None), (None, 3), (3, 3), (-1, 3)])
def test_window_is_checked(tmp_path: Path, start: int | None, end: int | None) -> None:
    with pytest.raises(ValueError, match=f"profile_step_start is {start} and train.profile_step_end is {end}"):
        ProfilerWindow(tmp_path, rank=0, start=start, end=end)
