"""The page as a file: its size, what it holds, what it needs, and what it does not let in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_m1.report import drawing
from megatron_m1.report.page import MARK, MOST_BYTES, check_output, page_of
from megatron_m1.report.runs import Run, open_runs, read_runs
from tests.report.made_runs import long_records, write_long_run, write_run


def opened(*folders: Path) -> list[Run]:
    runs = open_runs(folders)
    read_runs(runs)
    return runs


def without_library(text: str) -> str:
    """The page but for Bokeh's own script."""
    return text.replace(drawing.scripts(), "")


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    text = page_of(opened(write_long_run(tmp_path / "run", 60)))
    assert text.startswith(MARK) and drawing.scripts() in text
    rest = without_library(text)
    assert re.findall(r"https?://|//cdn|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")| src=", rest) == []
    assert "location.reload" not in re.sub(r"function again.*?\n  }\n", "", rest, flags=re.DOTALL)


def test_it_says_what_happened(tmp_path: Path) -> None:
    text = without_library(page_of(opened(write_long_run(tmp_path / "run", 200))))
    for words in (
        "<dt>context-128k</dt><dd>steps 121 to 200</dd>",
        "<dt>skipped steps</dt><dd>6</dd>",
        "<dt>checkpoints</dt><dd>5 kept, 19 written</dd>",
        "<li>after step 50, 20",
        '<code>optimizer.lr</code> 0.0003 &rarr; 0.0001<span class="unit">, restart after step 120</span>',
        "run: 6 fields",
    ):
        assert words in text, words


def test_what_runs_have_otherwise_stands_side_by_side(tmp_path: Path) -> None:
    records = long_records(3)
    one = write_run(tmp_path / "one", records, {"preset": "tiny", "model": {"num_layers": 8}})
    other = write_run(tmp_path / "other", records, {"preset": "tiny", "model": {"num_layers": 16}})
    text = page_of(opened(one, other))
    assert '<td class="path">model.num_layers</td><td>8</td><td>16</td>' in text
    assert text.count('<td class="path">preset</td>') == 2, "in each run's own table only"


def test_names_and_values_from_files_stay_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    records = [{"step": 1, "tokens": 1, "loss": 1.0, f"loss_{evil}": 2.0, evil: 3.0, "stage": evil}]
    run = write_run(tmp_path / evil.replace("/", "_"), records, {"preset": evil, evil: {"a": evil}})
    text = without_library(page_of(opened(run)))
    assert "<script>alert" not in text and "<img" not in text and text.count("&lt;script&gt;alert(1)") > 3


def test_a_run_to_which_nothing_has_happened_yet_has_a_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = page_of(opened(write_run(tmp_path / "run", [{"step": 7, "tokens": 70, "loss": 2.0}])))
    assert "<dt>tokens</dt><dd>70</dd>" in text and "No stage, restart, checkpoint or skipped step" in text
    assert caplog.records == [], "Bokeh has nothing to say of it"


@pytest.mark.slow
def test_many_runs_and_figures_stay_within_the_size(tmp_path: Path) -> None:
    """Fewer points each; the page of one run has as many as it can."""
    folders = [write_run(tmp_path / f"run{n}", long_records(1500, seed=n)) for n in range(4)]
    alone, together = page_of(opened(folders[0])), page_of(opened(*folders))
    assert len(alone) < len(together) <= MOST_BYTES


def test_a_page_that_is_too_large_with_the_fewest_points_is_refused(tmp_path: Path) -> None:
    records = [{"step": step} | {f"figure {n}": step for n in range(500)} for step in range(2)]
    runs = opened(*(write_run(tmp_path / f"run{n}", records) for n in range(3)))
    with pytest.raises(ValueError, match="a page of 3 runs with 500 charts is too large: name fewer runs"):
        page_of(runs)


def test_only_an_older_page_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    check_output(path)
    path.write_text(MARK + "<html>")
    check_output(path)
    path.write_text("<!doctype html>\n<p>mine")
    with pytest.raises(ValueError, match=r"report\.html is no page of megatron-m1 report: move it, or choose another"):
        check_output(path)
    with pytest.raises(ValueError, match="can't be written: Is a directory; choose another --output"):
        check_output(tmp_path)
