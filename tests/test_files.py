"""Locks where there are none, somebody's files of a lock's name, and what must not be written over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.files import check_writable, file_lock, refuse_overwriting
from tests.harness.preload import without_locks

LOCK_TWICE = """
import sys
from pathlib import Path
from megatron_m1.files import file_lock
for name in ("a.lock", "b.lock"):
    with file_lock(Path(sys.argv[1]) / name, wait=False):
        print("at work")
"""


@pytest.mark.parametrize("reason", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_locks_the_work_is_done_with_one_warning(tmp_path: Path, reason: str) -> None:
    environment = without_locks(tmp_path, reason)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOCK_TWICE, tmp_path / "work"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "at work\nat work\n")
    assert done.stderr.count("\n") == 1 and f"{tmp_path / 'work'} has no file locks" in done.stderr
    assert not list((tmp_path / "work").iterdir())


def test_a_lock_is_removed_and_nobodys_file_is(tmp_path: Path) -> None:
    path = tmp_path / "web.lock"
    with file_lock(path):
        assert path.stat().st_size > 0
        with pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
    assert not path.exists()
    path.touch()  # somebody's, as far as one can tell
    with file_lock(path), pytest.raises(BlockingIOError), file_lock(path, wait=False):
        pass
    assert path.exists()


def test_what_a_killed_holder_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "web.lock"
    with file_lock(path):
        left = path.read_bytes()
    path.write_bytes(left)
    with file_lock(path, wait=False):
        pass
    assert not path.exists()


def test_somebodys_file_is_no_lock(tmp_path: Path) -> None:
    note, link, folder = tmp_path / "note.lock", tmp_path / "link.lock", tmp_path / "folder.lock"
    note.write_text("the combination is 12-34-56\n")
    link.symlink_to(tmp_path / "elsewhere")
    folder.mkdir()
    for path in (note, link, folder):
        with pytest.raises(ValueError, match=rf"^{path} is there, and no lock of megatron-m1: "), file_lock(path):
            pass
    assert note.read_text() == "the combination is 12-34-56\n"
    assert link.is_symlink() and not (tmp_path / "elsewhere").exists() and folder.is_dir()


def test_one_file_under_several_names(tmp_path: Path) -> None:
    original = tmp_path / "web.json"
    original.write_text("{}")
    (tmp_path / "soft.jsonl").symlink_to(original)
    os.link(original, tmp_path / "hard.jsonl")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a")
    (tmp_path / "alias").symlink_to(tmp_path / "docs")
    refuse_overwriting([original, tmp_path / "new"], [tmp_path / "docs" / "a.txt", tmp_path / "new"])
    for name in ("web.json", "soft.jsonl", "hard.jsonl"):
        with pytest.raises(ValueError, match=rf"^{original} would be written over, but .*{name} is read: "):
            refuse_overwriting([original], [tmp_path / "docs" / "a.txt", tmp_path / name])
    for folder in ("docs", "alias"):
        for name in ("docs", "alias"):
            with pytest.raises(ValueError, match=r" would be written over, but "):
                refuse_overwriting([tmp_path / folder], [tmp_path / name / "a.txt"])


def test_a_folder_is_probed_and_left_as_it_is(tmp_path: Path) -> None:
    check_writable("it", tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(ValueError, match=r"^it can't be written: \S+: .*; choose another folder$"):
            check_writable("it", folder)
