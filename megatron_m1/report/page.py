"""The page: one HTML file with all that it needs, of limited size."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m1.files import regular
from megatron_m1.printing import counted
from megatron_m1.report.charts import COLOURS, SECTIONS, Chart, charts_of
from megatron_m1.report.marks import RESTART, STAGE, marks_of
from megatron_m1.report.runs import Run
from megatron_m1.report.words import differences, told

if TYPE_CHECKING:
    from jinja2 import Template

MARK = "<!doctype html>\n<!-- megatron-m1 report -->\n"
"""First lines of every page, by which one is known that may be written over."""
MOST_BYTES = 3_000_000
CHART_BYTES, CURVE_BYTES = 7000, 3000
"""Without points."""
TEMPLATE = "page.html"


def check_output(path: Path) -> None:
    """Check that nothing but an older page would be written over.

    Raises:
        ValueError: something else is there, or no folder for it; one line.
    """
    try:
        with regular(path).open("rb") as file:
            if file.read(len(MARK)) == MARK.encode():
                return
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path} can't be written: {path.parent} is no folder; choose another --output") from None
        return
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}; choose another --output") from error
    raise ValueError(f"{path} is no page of megatron-m1 report: move it, or choose another --output")


def page_of(runs: Sequence[Run], *, reload_seconds: int | None = None) -> str:
    """Make the page of runs that have records.

    Args:
        runs: read.
        reload_seconds: after which the page loads itself again; None never.

    Raises:
        ValueError: it would be too large even with the fewest points; one line.
    """
    # Imported here: who gives a wrong path has no need of Bokeh.
    from markupsafe import Markup

    from megatron_m1.report import drawing

    charts, marks = charts_of(runs), marks_of(runs)
    library = Markup(drawing.scripts())
    buckets = _buckets(charts, len(library))
    while buckets >= drawing.FEWEST_BUCKETS:
        script, places, timeline = drawing.draw(charts, marks, len(runs), buckets)
        text = MARK + _template().render(
            title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
            made=datetime.now().astimezone().isoformat(" ", "seconds"),
            library=library,
            script=Markup(script),
            sections=_sections(charts, [Markup(place) for place in places]),
            timeline=Markup(timeline),
            has_marks=bool(marks),
            has_spans=any(mark.kind in (STAGE, RESTART) for mark in marks),
            runs=[told(run) for run in runs],
            colours=COLOURS,
            differences=differences(runs) if len(runs) > 1 else [],
            reload_seconds=reload_seconds,
        )
        if len(text.encode()) <= MOST_BYTES:
            return text
        buckets //= 2
    raise ValueError(f"a page of {counted(len(runs), 'run')} with {len(charts)} charts is too large: name fewer runs")


def _buckets(charts: Sequence[Chart], library: int) -> int:
    """Return how many buckets each curve may have, as far as that can be told before they are drawn."""
    from megatron_m1.report import drawing

    curves = sum(len(chart.curves) for chart in charts)
    room = MOST_BYTES - library - CHART_BYTES * len(charts) - CURVE_BYTES * curves
    # Of a bucket two points of two numbers in fp32, as base64.
    return min(drawing.MOST_BUCKETS, room // (22 * max(curves, 1)))


def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )


def _sections(charts: Sequence[Chart], places: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    found = []
    for section in SECTIONS:
        cards = [
            {
                "title": chart.title,
                "unit": chart.unit,
                "place": place,
                "curves": [
                    {"label": curve.label, "colour": curve.colour, "last": _last(curve.series.last)}
                    for curve in chart.curves
                ],
            }
            for chart, place in zip(charts, places, strict=True)
            if chart.section == section
        ]
        if cards:
            found.append((section, cards))
    return found


def _last(last: tuple[int, float] | None) -> str:
    return "" if last is None else f"{last[1]:,.5g}" if abs(last[1]) < 1e5 else f"{last[1]:,.0f}"
