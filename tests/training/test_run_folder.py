"""One writer a run folder, freed by a kill, and nobody's files written over."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_m1.config import Config
from megatron_m1.config.written import write_config
from megatron_m1.training.run_folder import check_run_folder, sole_writer
from tests.harness.preload import without_locks

ROOT = Path(__file__).parents[2]
Holder = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """``holder(folder, beat=0.1)`` -> a process that holds the folder; it has said so."""
    started = []

    def start(
        folder: Path, *, beat: float = 0.1, silence: float = 2.0, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.training.lock_holder", str(folder), str(beat), str(silence)]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_writer_is_told_who_is_there_and_a_kill_frees_the_folder(tmp_path: Path, holder: Holder) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    assert first_line(process) == "held"
    for name in (folder, tmp_path / "link"):
        if name != folder:
            name.symlink_to(folder)
        who = rf"process {process.pid} on host {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:"
        with pytest.raises(ValueError, match=rf"^{name} is being trained by {who}"), sole_writer(name, print):
            pass
    process.kill()
    process.wait()
    assert (folder / "run.lock").exists()
    notes: list[str] = []
    with sole_writer(folder, notes.append):
        assert json.loads((folder / "run.lock").read_text())["process"] == str(os.getpid())
    assert notes == [], "on the same machine there is nothing to wait for"
    assert not (folder / "run.lock").exists()


LEAVES_A_CHILD = """
import os, sys
from pathlib import Path
from megatron_m1.training.run_folder import sole_writer
with sole_writer(Path(sys.argv[1]), print):
    child = os.fork()
    if child == 0:
        os.read(0, 1)
        os._exit(0)
print("left", flush=True)
os.waitpid(child, 0)
"""


def test_a_child_does_not_keep_the_folder(tmp_path: Path, holder: Holder) -> None:
    """A forked one has the open file, too, and may outlive the run. Not forked here: this process has threads."""
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"left\n"
        assert first_line(holder(tmp_path)) == "held"
        assert parent.poll() is None, "its child is still there"
    finally:
        parent.communicate(b"x", timeout=60)
    assert parent.returncode == 0


def sign_as_another_machine(path: Path) -> None:
    signature = json.loads(path.read_text()) | {"machine": "another", "host": "n7", "process": "123"}
    path.write_text(json.dumps(signature))


def test_another_machine_whose_locks_do_not_reach_us(tmp_path: Path, holder: Holder) -> None:
    """Its sign of life is all there is: as long as it comes the folder is taken."""
    with sole_writer(tmp_path, print):
        signature = (tmp_path / "run.lock").read_text()
    path = tmp_path / "run.lock"
    path.write_text(signature)
    sign_as_another_machine(path)
    alive = subprocess.Popen(
        [sys.executable, "-c", f"import os, time\nwhile True: os.utime({str(path)!r}), time.sleep(0.05)"]
    )
    try:
        notes: list[str] = []
        with (
            pytest.raises(ValueError, match=rf"^{tmp_path} is being trained by process 123 on host n7 since "),
            sole_writer(tmp_path, notes.append, silence_seconds=20.0),
        ):
            pass
        assert notes == [f"{path} was left by process 123 on host n7: looking for 20 s whether it still runs"]
        assert json.loads(path.read_text())["host"] == "n7"
    finally:
        alive.kill()
        alive.wait()
    with sole_writer(tmp_path, notes.append, silence_seconds=0.5):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_without_locks_the_signs_of_life_keep_a_second_writer_out(tmp_path: Path, holder: Holder) -> None:
    environment = without_locks(tmp_path, "ENOSYS")
    folder = tmp_path / "run"
    first = holder(folder, environment=environment)
    assert first_line(first) == "held"
    second = holder(folder, silence=20.0, environment=environment)
    out, error = second.communicate(timeout=60)
    assert f"is being trained by process {first.pid} on host" in error and "looking for 20 s" in out
    first.kill()
    first.wait()
    third = holder(folder, silence=1.0, environment=environment)
    assert "was left by process" in first_line(third) and first_line(third) == "held"
    third.terminate()
    assert f"{folder} has no file locks" in third.communicate(timeout=60)[1]
    assert not (folder / "run.lock").exists()


def test_somebodys_file_of_the_locks_name(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"run\.lock is there, and no lock of megatron-m1"),
        sole_writer(tmp_path, print),
    ):
        pass
    assert (tmp_path / "run.lock").read_text() == "mine"


def config_of(folder: Path) -> Config:
    config = Config()
    config.run.folder = str(folder)
    return config


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "starts.jsonl", "summary.json", "wandb_id"])
def test_somebodys_files_in_a_run_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("train: {max_steps: 5}  # mine\n")
    with pytest.raises(ValueError, match=rf"^run\.folder = {tmp_path} has a {name} that no run has written: move it"):
        check_run_folder(config_of(tmp_path))


def test_the_files_of_a_run_are_its_own(tmp_path: Path) -> None:
    write_config(config_of(tmp_path), tmp_path / "config.yaml")
    for name in ("metrics.jsonl", "starts.jsonl", "summary.json"):
        (tmp_path / name).write_text("{}\n")
    check_run_folder(config_of(tmp_path))
    # One of an earlier version, with fewer fields.
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(re.sub(r"  log_interval: \d+\n", "", text))
    check_run_folder(config_of(tmp_path))
    (tmp_path / "config.yaml").write_text("# for the paper\n" + text)
    with pytest.raises(ValueError, match=r"config\.yaml that no run has written"):
        check_run_folder(config_of(tmp_path))


@pytest.mark.parametrize("link", [False, True])
def test_a_corpus_called_summary(tmp_path: Path, link: bool) -> None:
    """Its sidecar has the name of the run's summary."""
    write_config(config_of(tmp_path), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text("{}")
    config = config_of(tmp_path)
    config.data.train = [str(tmp_path / "summary")]
    if link:
        (tmp_path / "web.json").symlink_to("summary.json")
        config.data.train = ["1", str(tmp_path / "web")]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/summary\.json would be written over, but "):
        check_run_folder(config)
