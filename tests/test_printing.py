"""Outputs that are closed, full or gone: runs go on, commands that only print say so or leave quietly."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

MODULE = "megatron_m1.cli"
RUN = """
import logging, sys, warnings
from rich.console import Console
from megatron_m1 import cli, printing

def command():
    printing.keep_output()
    logging.getLogger().addHandler(logging.StreamHandler())
    for _ in range(3):
        Console().print("x" * 9000)
        print("y" * 9000, flush=True)
        print("z", file=sys.stderr)
        sys.stderr.write("z" * 9000)
        logging.warning("w")
        warnings.warn("v")
    with open(sys.argv[1], "w") as file:
        file.write("went on")
    return 5

sys.exit(cli.exit_status(command))
"""
"""Prints as a run does, with more than a buffer holds, and ends with a status of its own."""


def went_on(tmp_path: Path, *, shell: str = "", **streams: int | IO[bytes]) -> bool:
    """Whether ``RUN`` came to its end, wrote its file and nothing else into it, and kept its status."""
    mark = tmp_path / "mark"
    run = [sys.executable, "-c", RUN, str(mark)]
    command = ["bash", "-c", f'exec "$@" {shell}', "bash", *run] if shell else run
    environ = os.environ | {"PYTHONWARNINGS": "always"}
    done = subprocess.run(command, env=environ, timeout=120, check=False, **streams)  # type: ignore[call-overload]
    return bool(done.returncode == 5 and mark.read_text() == "went on")


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1"])
def test_a_run_survives_closed_and_full_outputs(tmp_path: Path, shell: str) -> None:
    assert went_on(tmp_path, shell=shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_survives_its_reader(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert went_on(tmp_path, stdout=write, stderr=write)
    finally:
        os.close(write)


def test_a_run_survives_a_reader_that_is_slow_for_a_pipe_that_does_not_block(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        assert went_on(tmp_path, stdout=write, stderr=write)
    finally:
        os.close(read)
        os.close(write)


def test_a_run_survives_its_terminal(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    os.close(terminal)
    try:
        assert went_on(tmp_path, stdout=end, stderr=end)
    finally:
        os.close(end)


def test_what_can_be_printed_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path / "mark")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.replace("\n", "") == 3 * ("x" * 9000 + "y" * 9000)
    assert done.stderr.count("z") == 3 * 9001


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--preset", "tiny", "--model.num_layers", "800"]])
def test_a_command_that_only_prints_leaves_with_its_reader_but_not_silently_with_its_file(arguments: list[str]) -> None:
    command = [sys.executable, "-m", MODULE, *arguments]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    said = "megatron-m1: error: standard output can't be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_an_error_that_nobody_can_read_keeps_its_status() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", MODULE, "inspect", "--preset", "none"]
        assert subprocess.run(command, stderr=full, timeout=120, check=False).returncode == 2
