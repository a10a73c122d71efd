"""The page as a browser shows it: nothing fails, everything is drawn, on a phone and a wide screen, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_m1 import cli
from megatron_m1.report.charts import COLOURS
from megatron_m1.report.page import MOST_BYTES
from tests.report.browser import PHONE, WIDE, Browser
from tests.report.made_runs import SPIKE, SPIKE_LOSS, write_long_run, write_million

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CARDS = {False: (255, 255, 255), True: (24, 29, 36)}
"""Colour of the ground on which charts are drawn, by whether it is dark."""
COUNT_COLOURS = """
(() => {
    const found = [];
    const walk = (node) => {
        if (node.tagName === "CANVAS" && node.width > 0) found.push(node);
        if (node.shadowRoot) walk(node.shadowRoot);
        for (const child of node.children) walk(child);
    };
    return [...document.querySelectorAll("article[data-chart]")].map((card) => {
        found.length = 0;
        walk(card);
        const counts = {};
        for (const canvas of found) {
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            for (let at = 0; at < data.length; at += 4) {
                if (data[at + 3] !== 255) continue;
                const key = `${data[at]},${data[at + 1]},${data[at + 2]}`;
                counts[key] = (counts[key] || 0) + 1;
            }
        }
        return counts;
    });
})()
"""
"""Of each card, how many opaque pixels of its canvases have which colour."""
RANGES = "[...Bokeh.documents[0].roots()].map((plot) => [plot.x_range.start, plot.x_range.end])"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run with everything that a run may record."""
    work = tmp_path_factory.mktemp("one")
    return written(work, write_long_run(work / "a-run-with-a-rather-long-name-for-a-phone", 2000))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three runs of different lengths."""
    work = tmp_path_factory.mktemp("three")
    return written(work, *(write_long_run(work / f"run-{n}", 400 * n, seed=n) for n in (1, 2, 3)))


def written(work: Path, *runs: Path) -> Path:
    output = work / "report.html"
    assert cli.run(["report", *map(str, runs), "--output", str(output)]) == 0
    return output


def rgb(colour: str) -> str:
    return ",".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))


def box(browser: Browser, card: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of a chart in the window, scrolled to."""
    browser.value(f"document.querySelectorAll('article[data-chart]')[{card}].scrollIntoView({{block: 'center'}})")
    look = f"document.querySelectorAll('article[data-chart] .plot')[{card}].getBoundingClientRect()"
    left, top, width, height = browser.value(f"(({{left, top, width, height}}) => [left, top, width, height])({look})")
    return left, top, width, height


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_everything_is_drawn_and_nothing_fails(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(page, size, dark=dark)
    assert browser.faults() == []
    assert browser.value("document.documentElement.scrollWidth") == size[0], "nothing sticks out"
    titles = browser.value("[...document.querySelectorAll('article[data-chart] h3')].map((title) => title.innerText)")
    assert titles[0] == "Loss nats per token" and len(titles) == 13
    counts = browser.value(COUNT_COLOURS)
    assert len(counts) == len(titles) + 1
    keys = browser.value("[...document.querySelectorAll('article .keys')].map((keys) => keys.children.length)")
    for title, number, found in zip(titles, keys, counts, strict=False):
        drawn = [found.get(rgb(colour), 0) for colour in COLOURS[:number]]
        assert min(drawn) > 60, (title, drawn)
        ground = ",".join(map(str, CARDS[dark]))
        assert found.get(ground, 0) > sum(found.values()) / 3, (title, "the ground is the page's")
    assert counts[-1].get(rgb(COLOURS[0]), 0) > 50, "marks"


def test_colours_follow_the_system_while_the_page_is_open(browser: Browser, page: Path) -> None:
    browser.open(page, WIDE)
    figures = "[...Bokeh.documents[0].roots()].map((plot) => plot.border_fill_color)"
    light = set(browser.value(figures))
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert light == {"#ffffff"} and set(browser.value(figures)) == {"#181d24"}


def test_several_runs_lie_over_each_other(browser: Browser, three: Path) -> None:
    browser.open(three, WIDE)
    assert browser.faults() == []
    counts = browser.value(COUNT_COLOURS)
    titles = browser.value("[...document.querySelectorAll('article[data-chart] h3')].map((title) => title.innerText)")
    for name in ("Loss nats per token", "Training loss by source: code nats per token"):
        found = counts[titles.index(name)]
        assert min(found.get(rgb(colour), 0) for colour in COLOURS[:3]) > 60, name


def test_a_mouse_zooms_all_charts_and_their_values_follow(browser: Browser, page: Path) -> None:
    browser.open(page, WIDE)
    heights = "[...Bokeh.documents[0].roots()].map((plot) => plot.y_range.end)"
    before = browser.value(heights)[0]
    left, top, width, _ = box(browser, 0)
    y, start, end = top + 130, left + 0.6 * width, left + 0.8 * width
    browser.ask("Input.dispatchMouseEvent", type="mousePressed", button="left", x=start, y=y, clickCount=1)
    for part in range(1, 6):
        x = start + part * (end - start) / 5
        browser.ask("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, x=x, y=y)
    browser.ask("Input.dispatchMouseEvent", type="mouseReleased", button="left", x=end, y=y)
    browser.idle()
    ranges = browser.value(RANGES)
    assert all(found == ranges[0] for found in ranges)
    assert 900 < ranges[0][0] < ranges[0][1] < 1800
    assert browser.value(heights)[0] < 10 < before, "the spike is out of sight"
    assert browser.faults() == []


def test_a_finger_scrolls_the_page(browser: Browser, page: Path) -> None:
    browser.open(page, PHONE)
    left, top, width, _ = box(browser, 0)
    before, ranges = browser.value("scrollY"), browser.value(RANGES)
    x, y = left + width / 2, top + 180
    browser.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    for way in range(10, 200, 10):
        browser.ask("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y - way}])
    browser.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.idle()
    assert browser.value("scrollY") > before + 100
    assert browser.value(RANGES) == ranges


def test_a_key_hides_its_curve(browser: Browser, page: Path) -> None:
    browser.open(page, WIDE)
    shown = []
    for _ in range(2):
        browser.value("document.querySelector('[data-curve=curve1]').click()")
        browser.idle()
        shown.append(browser.value(COUNT_COLOURS)[0].get(rgb(COLOURS[1]), 0))
    assert shown[0] == 0 < shown[1]
    assert browser.value("document.querySelector('[data-curve=curve1]').getAttribute('aria-pressed')") == "true"


def test_a_spike_of_one_step_among_a_million_is_on_the_page(browser: Browser, tmp_path: Path) -> None:
    page = written(tmp_path, write_million(tmp_path / "run"))
    assert page.stat().st_size < MOST_BYTES
    browser.open(page, PHONE)
    assert browser.faults() == []
    points: dict[str, Any] = browser.value(
        """(() => {
            const plot = [...Bokeh.documents[0].roots()][0];
            const {x, y} = plot.renderers[0].data_source.data;
            const at = y.reduce((best, value, index) => value > y[best] ? index : best, 0);
            return {count: x.length, step: x[at], loss: y[at], last: x[x.length - 1], top: plot.y_range.end};
        })()"""
    )
    assert (points["step"], points["loss"]) == (SPIKE, SPIKE_LOSS)
    assert 900 < points["count"] <= 2048 and points["last"] > 999_000 and points["top"] > SPIKE_LOSS


def test_a_watched_page_loads_itself_again_where_one_looks(browser: Browser, page: Path, tmp_path: Path) -> None:
    """As ``--watch`` writes it, of a run that has gone on meanwhile."""
    watched = tmp_path / "watched.html"
    text = page.read_text()
    drawn = "document.documentElement.dataset.drawn = "
    watched.write_text(text.replace(drawn, f"again(doc, 2);\n{drawn}"))
    browser.open(watched, WIDE)
    watched.write_text(watched.read_text().replace("<h1>", "<h1>Later: "))
    browser.value("Bokeh.documents[0].get_model_by_name('steps').setv({start: 300, end: 500})")
    browser.settle()
    assert browser.value("document.querySelector('h1').innerText").startswith("Later: ")
    assert browser.value(RANGES)[0] == [300, 500]
    assert browser.faults() == []
