"""The sbatch file as bash runs it, between a scheduler and a run that stand-ins play."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "examples" / "pretrain_m1.sbatch"
SRUN = """#!/bin/bash
# Notes how it was called, then is a run that saves at USR1 or ends with STATUS.
printf '%s\\n' "$@" > "$NOTES/srun"
env | grep ^NCCL_ | sort > "$NOTES/nccl"
if [ "$STATUS" = waits ]; then
    trap 'sleep 0.1; touch "$NOTES/saved"; exit "${SAVED_STATUS:-0}"' USR1
    touch "$NOTES/ready"
    while :; do sleep 0.02; done
fi
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$NOTES/asked"
"""


class Job:
    """One job of SLURM's, which may start several times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"
        (folder / "bin").mkdir()
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(program)
            (folder / "bin" / name).chmod(0o755)

    def start(self, status: str, *, restarts: int, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the script until its end; a run that ``waits`` gets USR1 twice."""
        mine = {"PATH": self.path, "NOTES": str(self.folder), "STATUS": status}
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "m1"} | (
            {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        )
        process = subprocess.Popen(
            ["bash", SBATCH, "--run.folder", "a run"],
            cwd=self.folder,
            env=mine | slurm | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if status == "waits":
            deadline = time.monotonic() + 60
            while not (self.folder / "ready").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(2):
                process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def requeued(self) -> int:
        """How often SLURM was asked to."""
        asked = self.folder / "asked"
        return asked.read_text().count("requeue 17\n") if asked.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_run_that_ends_is_not_requeued(job: Job) -> None:
    done = job.start("0", restarts=2)
    assert (done.returncode, done.stdout, done.stderr, job.requeued()) == (0, "", "", 0)
    words = (job.folder / "srun").read_text().splitlines()
    assert words[:2] == ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert words[2:] == [
        *["bash", "examples/pretrain_m1.sh", "--config", "examples/configs/m1-mid.yaml", "--run.folder", "a run"]
    ]
    assert (job.folder / "nccl").read_text() == "NCCL_DEBUG=WARN\nNCCL_IB_TIMEOUT=22\n"


def test_the_time_limit_saves_and_requeues(job: Job) -> None:
    """As often as it takes: a time limit is no failure."""
    for restarts in (0, 1, 7):
        done = job.start("waits", restarts=restarts)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "pretrain_m1.sbatch: the time is nearly up: requeued\n"
        assert (job.folder / "saved").exists()
        (job.folder / "ready").unlink()
    assert job.requeued() == 3
    # The run was still saving when the script might have left.
    assert job.start("0", restarts=8).returncode == 0
    assert not (job.folder / "m1-17.restarts").exists()


def test_a_crash_requeues_up_to_the_limit(job: Job) -> None:
    for restarts in range(3):
        done = job.start("1", restarts=restarts)
        assert (done.returncode, job.requeued()) == (1, restarts + 1)
        assert done.stderr == f"pretrain_m1.sbatch: status 1: requeued, restart {restarts + 1} of 3\n"
    done = job.start("70", restarts=3)
    assert (done.returncode, job.requeued()) == (70, 3)
    assert done.stderr == "pretrain_m1.sbatch: status 70 after 3 restarts: not requeued\n"
    assert job.start("1", restarts=3, MAX_RESTARTS="4").stderr.endswith("restart 4 of 4\n")


def test_restarts_for_the_time_limit_do_not_count_as_failures(job: Job) -> None:
    job.start("waits", restarts=4)
    done = job.start("1", restarts=5)
    assert done.stderr == "pretrain_m1.sbatch: status 1: requeued, restart 1 of 3\n"
    assert job.start("1", restarts=8).stderr == "pretrain_m1.sbatch: status 1 after 3 restarts: not requeued\n"


def test_a_save_that_fails_at_the_time_limit_is_a_failure(job: Job) -> None:
    done = job.start("waits", restarts=0, SAVED_STATUS="1")
    assert done.stderr == "pretrain_m1.sbatch: status 1: requeued, restart 1 of 3\n"
    assert not (job.folder / "m1-17.restarts").exists()


def test_a_refused_configuration_is_not_tried_again(job: Job) -> None:
    done = job.start("2", restarts=0)
    assert (done.returncode, job.requeued()) == (2, 0)
    assert done.stderr == "pretrain_m1.sbatch: status 2 after 0 restarts: not requeued\n"


def test_what_the_file_asks_of_slurm() -> None:
    text = SBATCH.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert asked["output"] == "%x-%j.out"
    assert asked["error"] == "%x-%j.err"
    assert asked["open-mode"] == "append"
    # To the script, which passes it on: it must know of it.
    assert asked["signal"] == "B:USR1@300"
    assert "requeue" in asked
    assert "--container-image=" in text and "apptainer exec" in text
    # Every variable of NCCL's has its reason above it.
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"(# )?export NCCL_", line):
            assert re.match(r"# [A-Z]", lines[number - 1]) or re.match(r"# \w", lines[number - 2])


@pytest.mark.parametrize("line", ["container=", "inside="])
def test_a_container_is_one_line(tmp_path: Path, line: str) -> None:
    """With its comment taken away the script starts the run in it."""
    job = Job(tmp_path)
    text = SBATCH.read_text()
    script = tmp_path / "job.sbatch"
    script.write_text(text.replace(f"# {line}", line))
    environ = {"PATH": job.path, "NOTES": str(tmp_path), "STATUS": "0", "PWD": str(tmp_path)}
    subprocess.run(["bash", script], cwd=tmp_path, env=environ, check=True)
    words = (job.folder / "srun").read_text().splitlines()
    where = words.index("bash")
    if line == "container=":
        assert words[2] == f"--container-image={tmp_path}/m1.sqsh" and where == 5
    else:
        assert words[2:5] == ["apptainer", "exec", "--nv"] and words[where - 1] == "m1.sif"
