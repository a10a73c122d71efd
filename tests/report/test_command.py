"""``megatron-m1 report`` as it is typed: what it prints and writes, what it refuses, and a run that goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from megatron_m1 import cli
from megatron_m1.report.page import MARK
from tests.harness.terminal import Terminal
from tests.report.made_runs import long_records, write_run

CLI = [sys.executable, "-m", "megatron_m1.cli", "report"]


def test_it_writes_the_page_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "a" / "x", long_records(30))
    write_run(here / "b" / "x", long_records(20))
    assert cli.run(["report", "a/x"]) == 0
    assert re.fullmatch(r"report\.html: x to step 30, 1\.\d MB\n", capsys.readouterr().out)
    assert cli.run(["report", "a/x", "b/x", "--output", "two.html"]) == 0
    assert re.fullmatch(r"two\.html: a/x to step 30, b/x to step 20, 1\.\d MB\n", capsys.readouterr().out)
    assert {path.name for path in here.iterdir()} == {"a", "b", "report.html", "two.html"}
    assert (here / "two.html").read_text().startswith(MARK)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: RUN"),
        (["no"], "no does not exist: give the folder of a run"),
        (["run/metrics.jsonl"], "run/metrics.jsonl is a file: give the folder of a run"),
        (["run/checkpoints"], "run/checkpoints has no metrics.jsonl: did you mean "),
        (["empty"], "empty has no metrics.jsonl: give the folder of a run (run.folder)"),
        (["run", "./run"], "run is the same run as run: name it once"),
        (["new"], "new/metrics.jsonl has no records yet: they come with the first step (--watch waits)"),
        (["counts"], "counts/metrics.jsonl has no records yet"),
        (["run", "--output", "mine.html"], "mine.html is no page of megatron-m1 report: move it"),
        (["run", "--output", "no/a.html", "--watch"], "no/a.html can't be written: "),
        (["run", "--output", "run/metrics.jsonl"], "run/metrics.jsonl is no page of megatron-m1 report"),
        (["run", "--watch", "--interval", "0"], "argument --interval: '0' is not an integer above 0"),
        (["run", "--wtach"], "unknown option --wtach: did you mean --watch?"),
        ([f"run{n}" for n in range(11)], "11 runs are too many for one page: give 10 at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    write_run(here / "run", long_records(2))
    write_run(here / "new", [])
    write_run(here / "counts", [{"step": 7, "tokens": 70}])
    (here / "run" / "checkpoints").mkdir()
    (here / "empty").mkdir()
    (here / "mine.html").write_text("mine")
    before = sorted(here.rglob("*"))
    assert cli.exit_status(lambda: cli.run(["report", *words])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and said in err, err
    assert sorted(here.rglob("*")) == before


def test_without_bokeh_it_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(here / "run", long_records(2))
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert cli.exit_status(lambda: cli.run(["report", "run"])) == 2
    assert "a report needs bokeh, which is not installed: pip install 'megatron-m1[report]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_reading_has_a_bar_that_leaves_nothing_behind(here: Path) -> None:
    write_run(here / "run", [{"step": n, "loss": 1.0, "words": "x" * 900} for n in range(1, 5001)])
    terminal = Terminal([*CLI, "run"], columns=80, environ=os.environ, cwd=here)
    assert terminal.ends() == 0
    assert re.search(r"reading records.*4\.\d/4\.\d MB", terminal.raw())
    screen = terminal.screen()
    terminal.close()
    assert [text[:27] for text in screen.lines if text] == ["report.html: run to step 5,"] and screen.cursor_is_shown


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@pytest.mark.slow
def test_a_run_that_goes_on_is_watched(here: Path) -> None:
    """From before its first step; a reader at any time sees a whole page."""
    run = write_run(here / "run", [])
    command = [*CLI, "run", "--watch", "--interval", "1"]
    # Whoever runs the tests in the background ignores Ctrl-C.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c) as watch:
        assert line(watch.stdout) == "watching, Ctrl-C ends: report.html\n"
        first = here / "first.html"
        for steps in (5, 9):
            with (run / "metrics.jsonl").open("a") as file:
                file.writelines(
                    json.dumps(record) + "\n" for record in long_records(steps) if record["step"] > steps - 4
                )
            assert line(watch.stdout).startswith(f"report.html: run to step {steps}, ")
            text = (here / "report.html").read_text()
            assert text.endswith("</html>") and f"<dt>steps</dt><dd>{steps}</dd>" in text
            assert "again(doc, 1);" in text
            if steps == 5:
                # What somebody has open stays whole: the next page is another file.
                (here / "report.html").rename(first)
        assert first.read_text().endswith("</html>")
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 0
    text = (here / "report.html").read_text()
    assert text.endswith("</html>") and "again(doc, 1);" not in text
    assert sorted(path.name for path in here.iterdir()) == ["first.html", "report.html", "run"]
