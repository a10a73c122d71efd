"""Checkpoints, starts and changed settings: of a run that was trained, stopped and gone on with, and of odd folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_m1.report.history import Change, read_history
from megatron_m1.report.runs import open_runs, read_runs
from megatron_m1.report.words import told
from megatron_m1.runtime.pool import WorkerPool
from tests.report.made_runs import SETTINGS, write_checkpoint, write_run, write_start
from tests.training import loop_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any], workers: WorkerPool) -> Path:
    """A run of four steps that went on to six, with another learning rate and another clipping."""
    work = tmp_path_factory.mktemp("trained")
    always: list[loop_runs.Setting] = [
        ("run.tensorboard", True),
        ("run.save_interval", 2),
        ("optimizer.lr_decay_tokens", 1536),
    ]
    changes: list[loop_runs.Setting] = [("optimizer.lr", 1e-3), ("optimizer.clip_grad", 0.5)]
    for steps, also in ((4, []), (6, changes)):
        settings = [*always, ("train.max_steps", steps), *also]
        file = loop_runs.write_settings(work / f"{steps}.yaml", tiny_corpus, work / "run", *settings)
        workers.run(loop_runs.train, file, world_size=1)
    return work / "run"


@pytest.mark.slow
def test_a_restart_of_a_real_run_is_found_with_what_it_changed(trained: Path) -> None:
    history = read_history(trained)
    assert history.checkpoints == [2, 4, 6]
    assert [(start.step, start.stage) for start in history.starts] == [(0, None), (4, None)]
    first, second = (start.when for start in history.starts)
    assert first is not None and second is not None and first < second
    assert history.settings["optimizer.lr"] == 1e-3
    changed = {change.path: change for change in history.changes}
    assert changed["optimizer.lr"] == Change("optimizer.lr", 3e-3, 1e-3, 0, 4, history.starts[1])
    assert {"optimizer.lr", "optimizer.clip_grad", "train.max_steps"} <= set(changed)
    assert not any(path.startswith(("model.", "parallel.")) for path in changed)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 1])
def test_starts_of_before_they_were_recorded(trained: Path, tmp_path: Path, lines: int) -> None:
    """Of a run of an older version, and of one that a newer version has gone on with, in the last lines of the file."""
    known = read_history(trained)
    folder = shutil.copytree(trained, tmp_path / "run")
    text = (folder / "starts.jsonl").read_text().splitlines(keepends=True)
    (folder / "starts.jsonl").write_text('{"step": 4, "time"\n' + "".join(text[len(text) - lines :]))
    history = read_history(folder)
    assert [start.step for start in history.starts] == [0, 4]
    assert [start.settings is not None for start in history.starts] == [False, lines > 0]
    changed = {change.path: change for change in history.changes}
    start = history.starts[1] if lines else None
    assert changed["optimizer.lr"] == Change("optimizer.lr", 3e-3, 1e-3, 4, 4 if lines else 6, start)
    assert history.settings == known.settings


@pytest.mark.slow
def test_it_is_told_in_words(trained: Path) -> None:
    (run,) = opened = open_runs([trained])
    read_runs(opened)
    words = told(run)
    facts = dict(words.facts)
    assert (facts["steps"], facts["tokens"], facts["restarts"]) == ("6", "1,536", "1")
    assert facts["checkpoints"] == "3 kept" and facts["last validation loss"].endswith(" (step 6)")
    assert [text.startswith("after step 4, 20") for text in words.restarts] == [True]
    assert ("optimizer.lr", "0.003", "0.001", "restart after step 4") in words.changes
    assert words.stages == []


def test_a_change_lies_between_the_checkpoints_that_show_it(tmp_path: Path) -> None:
    later = SETTINGS | {"optimizer": {"lr": 1e-4, "clip_grad": 1.0}}
    now = later | {"model": SETTINGS["model"] | {"rotary_base": 5e6}}
    write_run(tmp_path / "run", [{"step": 90, "tokens": 90, "loss": 1.0}], now)
    for step, settings in ((10, SETTINGS), (20, SETTINGS), (40, later), (80, later)):
        write_checkpoint(tmp_path / "run", step, settings)
    for step in (0, 20, 30):
        write_start(tmp_path / "run", step)
    (run,) = opened = open_runs([tmp_path / "run"])
    read_runs(opened)
    assert told(run).changes == [
        ("optimizer.lr", "0.0003", "0.0001", "after step 20, by 40"),
        ("model.rotary_base", "None", "5000000.0", "after step 80"),
    ]


def test_without_event_files_the_records_show_restarts(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run",
        [{"step": step, "tokens": step, "loss": 1.0, "memory_peak_gib": 3.0 - (step > 2)} for step in (1, 2, 3, 4)],
    )
    (run,) = opened = open_runs([tmp_path / "run"])
    read_runs(opened)
    assert told(run).restarts == ["after step 2, at a time that is not recorded"]


def test_what_can_not_be_read_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "config.yaml").write_text("a: [")
    (folder / "resolved.yaml").write_text(yaml.safe_dump([1, 2]))
    (folder / "tensorboard").mkdir()
    events = folder / "tensorboard" / "events.out.tfevents.1"
    for suffix, content in (("a", b""), ("b", b"\xff" * 64), ("c", b"\x04" + bytes(11) + b"abcd" + bytes(4))):
        events.with_suffix(f".{suffix}").write_bytes(content)
    os.mkfifo(events.with_suffix(".pipe"))
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True)
    history = read_history(folder)
    assert (history.checkpoints, history.starts, history.settings, history.changes) == ([], [], {}, [])
