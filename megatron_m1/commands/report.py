"""``megatron-m1 report``: one page of what runs have recorded."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.paths import path_option
from megatron_m1.files import check_writable, refusal, write_atomically

if TYPE_CHECKING:
    from megatron_m1.report.runs import Run

DESCRIPTION = """\
Draw what runs have recorded as one HTML page that needs nothing else, neither network nor this program: loss, learning
rate, gradient norm, expert load, throughput; stages, restarts, checkpoints, skipped steps; the configuration and what
changed. Several runs lie over each other. docs/report.md explains it."""
NEEDED = ("bokeh", "jinja2")
DEFAULT = Path("report.html")
WATCH_SECONDS = 10
"""Between two looks at runs that go on."""


def command_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser("report", DESCRIPTION, "RUN [RUN ...] [--output FILE.html] [--watch]")
    parser.add_argument("runs", type=path_option, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--output", type=path_option, metavar="FILE.html", default=DEFAULT, help=f"the page (default: {DEFAULT})"
    )
    parser.add_argument(
        "--watch", action="store_true", help="go on: write the page again when records come, until Ctrl-C"
    )
    parser.add_argument(
        "--interval",
        type=positive_integer,
        metavar="SECONDS",
        default=WATCH_SECONDS,
        help=f"with --watch: between two looks (default: {WATCH_SECONDS})",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, or no library to draw with; one line.
    """
    options = command_parser().parse_all(arguments)
    # numpy takes a while, and nobody needs it for --help.
    from megatron_m1.report.page import check_output
    from megatron_m1.report.runs import open_runs

    runs = open_runs(options.runs)
    check_output(options.output)
    check_writable(f"{options.output}", options.output.absolute().parent)
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"a report needs {name}, which is not installed: pip install 'megatron-m1[report]'")
    return _watch(runs, options.output, options.interval) if options.watch else _once(runs, options.output)


def _once(runs: Sequence[Run], output: Path) -> int:
    from megatron_m1.report.runs import read_runs

    read_runs(runs)
    empty = next((run for run in runs if run.records.is_empty), None)
    if empty is not None:
        raise ValueError(f"{empty.records.path} has no records yet: they come with the first step (--watch waits)")
    _write(runs, output, reload_seconds=None)
    print(_line(runs, output))
    return 0


def _watch(runs: Sequence[Run], output: Path, seconds: int) -> int:
    from megatron_m1.report.runs import read_runs

    print(f"watching, Ctrl-C ends: {output}", flush=True)
    is_written = False
    try:
        while True:
            if read_runs(runs) and any(not run.records.is_empty for run in runs):
                _write(runs, output, reload_seconds=seconds)
                is_written = True
                print(_line(runs, output), flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        if is_written:
            # The last page stands still.
            _write(runs, output, reload_seconds=None)
        return 0


def _write(runs: Sequence[Run], output: Path, *, reload_seconds: int | None) -> None:
    from megatron_m1.report.page import page_of

    page = page_of(runs, reload_seconds=reload_seconds).encode()
    try:
        write_atomically(output, page)
    except OSError as error:
        raise ValueError(f"{output} can't be written: {refusal(error, output.absolute().parent)}") from error


def _line(runs: Sequence[Run], output: Path) -> str:
    steps = ", ".join(f"{run.name} to step {run.records.last_step:,}" for run in runs)
    return f"{output}: {steps}, {output.stat().st_size / 1e6:.1f} MB"
