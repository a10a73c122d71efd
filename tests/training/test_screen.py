"""What a run shows on a real terminal, by its width, and how it leaves it."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_m1.config.tree import RunConfig
from megatron_m1.launch import SECOND_INTERRUPT
from megatron_m1.runtime.watchdog import HUNG_EXIT_CODE
from megatron_m1.training import figures
from megatron_m1.training.metrics import MetricsLog
from tests.harness.terminal import Screen, Terminal
from tests.training import drawing_rank
from tests.training import loop_runs as runs
from tests.training.test_metrics import RECORD

BAR = "━"
LAUNCH = (
    "import sys; from megatron_m1.launch import Launch, start_workers;"
    "sys.exit(start_workers(Launch(1, 0, 1, '127.0.0.1', None), sys.argv[1:]))"
)


LABELS = (
    "versions|mesh|experts|devices|model|data|batch|packs|steps|lr|folder|"
    "metrics|tensorboard|checkpoint|profile|generate"
)
"""Of the lines with which a run begins and ends."""


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """``terminal("-m", "megatron_m1.cli", ..., columns=80)``: Python in a terminal, outside of any launcher."""
    opened: list[Terminal] = []

    def start(*arguments: object, columns: int = 80) -> Terminal:
        outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK")}
        outside |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        opened.append(Terminal([sys.executable, *map(str, arguments)], columns=columns, environ=outside))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("columns", "first", "bar"),
    [
        (60, "step      1/100000 | loss 7.2500 | grad 0.50 | 3.14K tok/s", 10),
        (80, "step      1/100000 | loss 7.2500 | grad 0.50 | lr 2.0e-04 | 3.14K tok/s", 20),
        (
            200,
            "step      1/100000 | tokens 81.92K | loss 7.2500 | aux 1.0312 | grad norm 0.500 | lr 2.00e-04 | "
            "3.14K tokens/s | 0.0123 TFLOP/s per device | load 1.50",
            20,
        ),
    ],
)
def test_a_step_fits_its_line_and_the_live_line_keeps_its_bar(
    tmp_path: Path, columns: int, first: str, bar: int
) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=columns)
    screen = Screen(columns)
    settings = RunConfig(tensorboard=False)
    with MetricsLog(tmp_path, settings, start_step=0, total_steps=100_000, console=console) as log:
        for step in (1, 2):
            log.log_step(step, RECORD)
        # As the terminal's driver does.
        screen.feed(output.getvalue().replace("\n", "\r\n"))
    assert not screen.wrapped
    assert screen.lines[0] == first
    live = screen.lines[2]
    assert live.count(BAR) + live.count("╸") + live.count("╺") == bar
    assert re.search(r" 2/100000 .*loss 7\.2500 (.* )?(\d:\d\d:\d\d|-:--:--)$", live)


def test_what_matters_least_goes_first() -> None:
    """Down to the loss alone, and no figure is ever cut."""
    full = [figure.show(value) for figure, value in RECORD.items() if not (figure.hides_zero and value == 0)]
    short = [figure.show(value, short=True) for figure, value in RECORD.items()]
    before = len(RECORD) + 1
    for columns in range(160, 5, -1):
        shown = figures.shown(RECORD, columns).split(" | ")
        assert len(" | ".join(shown)) <= columns or len(shown) == 1
        assert set(shown) <= set(full) or set(shown) <= set(short)
        assert len(shown) <= before
        before = len(shown)
    assert shown == ["loss 7.2500"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hang", "interrupt", "launched"])
def test_no_way_out_leaves_a_spoilt_terminal(terminal: Callable[..., Terminal], tmp_path: Path, way: str) -> None:
    """A watchdog's end, and a second Ctrl-C with a launcher and without: no clean-up runs in any of them."""
    program = [Path(drawing_rank.__file__), tmp_path / "run", "hang" if way == "hang" else "wait"]
    run = terminal(*(["-c", LAUNCH, *program] if way == "launched" else program))
    if way != "hang":
        run.wait_for(lambda: "1/9 loss" in "".join(run.screen().lines))
        run.press_ctrl_c()
        run.wait_for(lambda: "SIGINT: finishing the first step, then saving" in run.raw())
        while SECOND_INTERRUPT not in run.raw():
            run.press_ctrl_c()
            time.sleep(0.05)
    status = run.ends()
    assert status == {"hang": HUNG_EXIT_CODE, "interrupt": -signal.SIGINT, "launched": 130}[way]
    screen = run.screen()
    said = r"rank 0 hung in step 1 for \d+ s; its main thread is here:" if way == "hang" else SECOND_INTERRUPT
    assert sum(bool(re.match(said, line)) for line in screen.lines) == 1
    assert screen.cursor_is_shown
    assert BAR not in "".join(screen.lines)
    # Nor was it hidden meanwhile: a kill gives no time for anything.
    assert run.raw().index("\x1b[?25h") < run.raw().index("step 1/9")
    assert run.raw().count("\x1b[?25l") == 1


@pytest.mark.slow
def test_a_run_in_80_columns(terminal: Callable[..., Terminal], tmp_path: Path, tiny_corpus: dict[str, Any]) -> None:
    """Every line fits, the profiler is quiet and its file named, Ctrl-C is answered once."""
    window = [("train.profile_step_start", 2), ("train.profile_step_end", 4)]
    endless = [("train.max_steps", 100_000), ("run.save_interval", 0), ("train.eval_interval", 0)]
    settings = runs.write_settings(tmp_path / "run.yaml", tiny_corpus, tmp_path / "r", *endless, *window)
    command = ["-m", "megatron_m1.cli", "pretrain", "--config", settings]
    run = terminal(*command)
    run.wait_for(lambda: runs.steps_recorded(tmp_path / "r") > 4)
    run.press_ctrl_c()
    assert run.ends() == 0
    screen = run.screen()
    profile = (
        f"profile of steps 2 to 3 written to {tmp_path / 'r' / 'profile' / 'steps_2_to_3_rank_0.json'} (one a rank)"
    )
    assert profile in "".join(screen.lines)
    # A path stays whole, so that it can be copied.
    for row in screen.wrapped:
        begin = next(above for above in range(row, -1, -1) if above not in screen.wrapped)
        end = next(below for below in range(row, len(screen.lines) + 1) if below not in screen.wrapped)
        assert str(tmp_path.parent) in "".join(screen.lines[begin:end])
    text = "\n".join(screen.lines)
    (answer,) = re.findall(r"^SIGINT: finishing (?:the step|step (\d+)), then saving$", text, re.MULTILINE)
    (saved,) = re.findall(r"^SIGINT: saving step (\d+), then leaving$", text, re.MULTILINE)
    # During the vote of the ranks nobody knows which it will be.
    assert answer in ("", saved)
    ours = re.compile(
        r"step +\d+/100000 \| loss .*|profile of .*|.*\(one a rank\)|"
        rf"(?:{LABELS}) .*|warning: .*|  .*|"
        r"(\^C)?SIGINT: .*|checkpoint step_\d+ saved .*|[┌└├ ].*|│.*│|"
    )
    rest = [line for number, line in enumerate(screen.lines) if number not in screen.wrapped]
    assert [line for line in rest if not ours.fullmatch(line)] == []
    lives = [part for part in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", run.raw())) if BAR in part]
    assert all(re.match(r"[━╸╺]{20} +\d+/100000 ", part) and len(part) < 80 for part in lives)
    assert screen.cursor_is_shown
