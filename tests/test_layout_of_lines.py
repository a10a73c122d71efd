"""Lines, tables and counts as a terminal of any width shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.printing import counted, folded, table
from tests.harness.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "megatron_m1.cli"]
NUMBER = re.compile(r"\d[\d,.]*\d|\d")


def test_one_is_singular() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 2048)] == ["0 steps", "1 step", "2 steps", "2,048 steps"]
    assert [counted(n, "process", "processes") for n in (1, 8)] == ["1 process", "8 processes"]


def test_a_line_breaks_between_words() -> None:
    line = "world       2,048 processes (256 nodes x 8), /a/path/that/is/longer/than/any/line"
    assert folded(line, None) == folded(line, 200) == [line]
    assert folded(line, 40, indent=12) == [
        "world       2,048 processes (256 nodes x",
        "            8),",
        "            /a/path/that/is/longer/than/any/line",
    ]


def test_a_table_wraps_whole_cells() -> None:
    rows = [["layer", "kind", "experts", "total"], ["0", "softmax", "5,435,817,984", "5,687,693,312"]]
    wide = ["layer  kind           experts          total", "    0  softmax  5,435,817,984  5,687,693,312"]
    assert table(rows, None, left=[1]) == table(rows, 44, left=[1]) == wide
    assert table(rows, 43, left=[1]) == [
        *["layer  kind           experts", "               total"],
        *["    0  softmax  5,435,817,984", "       5,687,693,312"],
    ]
    assert all(len(line) <= 20 for line in table(rows, 20, left=[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "--preset", "m1-456b"],
        ["pretrain", "--dry-run", "--config", "examples/configs/m1-456b.yaml", "--world-size=2048", "--device=gpu"],
    ],
    ids=["inspect", "dry-run"],
)
def test_no_number_is_cut_on_a_terminal(tmp_path: Path, command: list[str]) -> None:
    if command[0] == "pretrain":
        command = [*command, f"--run.folder={tmp_path / 'run'}", f"--data.embedded_corpus={tmp_path / 'corpus'}"]
    plain = subprocess.run([*CLI, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for columns in (60, 80, 200):
        terminal = Terminal([*CLI, *command], columns=columns, environ=os.environ, cwd=ROOT)
        assert terminal.ends() == 0
        screen = terminal.screen()
        terminal.close()
        # But for a path, which stays whole.
        assert all("/" in screen.lines[number - 1] for number in screen.wrapped)
        whole = "".join(("" if number in screen.wrapped else "\n") + line for number, line in enumerate(screen.lines))
        shown = NUMBER.findall(whole.replace(str(tmp_path), ""))
        assert sorted(shown) == sorted(NUMBER.findall(plain.replace(str(tmp_path), "")))
        layers = [line for line in screen.lines if re.fullmatch(r" +\d+  (lightning|softmax)( +[\d,]+){5}", line)]
        assert len(layers) == (80 if command[0] == "inspect" and columns >= 80 else 0)
