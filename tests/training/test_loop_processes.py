"""The real command with its real processes: killed, asked to stop, and with a rank that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_m1.runtime.pool import WorkerPool
from tests.training import loop_runs as runs
from tests.training.loop_runs import Setting

pytestmark = pytest.mark.slow

START_SECONDS = 240.0
"""More than two processes need for their imports on a machine that is busy."""
TIMEOUT_SECONDS = 8.0
"""Of a collective; more than both ranks ever differ in their progress through the start."""


class Job:
    """``megatron-m1 pretrain --nproc-per-node 2`` in the background."""

    def __init__(self, settings: Path, folder: Path) -> None:
        self.folder = folder
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = ["-m", "megatron_m1.cli", "pretrain", "--config", str(settings), "--nproc-per-node", "2"]
        self.launcher = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def trains(self, steps: int) -> None:
        """Wait until more than ``steps`` steps are recorded."""
        runs.wait_for(
            lambda: runs.steps_recorded(self.folder) > steps,
            lambda: self.launcher.poll() is not None,
            seconds=START_SECONDS,
        )

    def workers(self) -> list[psutil.Process]:
        """Processes of ranks 0 and 1."""
        below = psutil.Process(self.launcher.pid).children(recursive=True)
        ranks = {int(p.environ()["RANK"]): p for p in below if "RANK" in p.environ()}
        return [ranks[0], ranks[1]]

    def ends(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        out, err = self.launcher.communicate(timeout=START_SECONDS)
        return self.launcher.returncode, out, err


@pytest.fixture
def start(tmp_path: Path, tiny_corpus: dict[str, Any]) -> Iterator[Callable[..., Job]]:
    """Start a job of so many steps that it does not end by itself; nothing of it outlives the test."""
    jobs = []

    def begin(*changes: Setting) -> Job:
        endless: list[Setting] = [("train.max_steps", 10_000), ("run.save_interval", 3), *changes]
        settings = runs.write_settings(tmp_path / "job.yaml", tiny_corpus, tmp_path / "run", *endless)
        jobs.append(Job(settings, tmp_path / "run"))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.launcher.poll() is None:
            # Its agent and workers ask Linux to die with it.
            job.launcher.kill()
            job.launcher.communicate()


def test_killed_in_mid_run_and_resumed(
    workers: WorkerPool, start: Callable[..., Job], tmp_path: Path, tiny_corpus: dict[str, Any]
) -> None:
    """And not started a second time meanwhile."""
    job = start()
    job.trains(4)
    processes = job.workers()
    for process in processes:
        # Else it would train on while the other one starts, and all of that would have to be trained again below.
        process.suspend()
    status, _, err = start().ends()
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(rf"run is being trained by process {processes[0].pid} on host \S+ since \d{{4}}-", err)
    job.launcher.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    job.ends()
    last = runs.steps_recorded(job.folder)
    saved = sorted(path.name for path in (job.folder / "checkpoints").glob("step_????????"))
    assert saved and int(saved[-1].removeprefix("step_")) <= last
    steps = ("train.max_steps", last + 2)
    for folder in ("run", "straight"):
        path = runs.write_settings(tmp_path / "again.yaml", tiny_corpus, tmp_path / folder, steps)
        workers.run(runs.train, path, world_size=2, process_group=False)
    assert runs.trace(job.folder) == runs.trace(tmp_path / "straight")


def test_a_signal_to_the_launcher_saves_and_leaves_nothing_else_to_say(start: Callable[..., Job]) -> None:
    """SIGUSR1; tests/launch/test_launch.py sends SIGTERM the same way."""
    job = start()
    job.trains(4)
    job.launcher.send_signal(signal.SIGUSR1)
    status, out, err = job.ends()
    assert (status, err) == (0, "")
    summary = json.loads((job.folder / "summary.json").read_text())
    assert summary["interrupted"] == "SIGUSR1"
    assert (job.folder / "checkpoints" / "latest").read_text() == f"step_{summary['step']:08d}\n"
    assert re.search(r"interrupted +│ SIGUSR1", out)
    assert len(re.findall(r"^SIGUSR1: finishing (?:the step|step \d+), then saving$", out, re.MULTILINE)) == 1
    notes = r"starting 2 processes .*|SIGUSR1: finishing .*|SIGUSR1: saving step \d+, .*|checkpoint step_\d+ saved .*"
    labels = "versions|mesh|experts|devices|model|data|batch|steps|lr|folder|metrics|checkpoint|generate"
    ours = re.compile(rf"{notes}|warning: \S+ is read .*|(?:{labels}) .*|step +\d+/10000 \| .*|[┌└├ ].*|│.*│")
    assert [line for line in out.splitlines() if not ours.fullmatch(line)] == []


def test_a_rank_that_hangs_ends_the_job_with_one_line(start: Callable[..., Job]) -> None:
    job = start(("parallel.distributed_timeout_seconds", TIMEOUT_SECONDS))
    job.trains(2)
    waiting, hanging = job.workers()
    hanging.send_signal(signal.SIGSTOP)
    waiting.wait(START_SECONDS)
    # Stopped, it can't leave when torchrun asks it to, which waits half a minute before it kills.
    hanging.kill()
    status, _, err = job.ends()
    assert status == 1
    # Recorded, a step goes on: ranks agree on signals, and it may be saved.
    last = runs.steps_recorded(job.folder)
    lines = err.splitlines()
    assert len(lines) == 1, err
    said = re.match(
        r"megatron-m1: error: rank 0, step (\d+): a collective failed after \d+ s without progress ", lines[0]
    )
    assert said is not None, err
    assert int(said[1]) in (last, last + 1)
    assert lines[0].endswith("; rank 1 reported nothing: look there first")
