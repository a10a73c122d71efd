"""Charts as Bokeh figures, which share one axis of steps. The only file that imports Bokeh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CustomJSTickFormatter,
    FixedTicker,
    Glyph,
    GlyphRenderer,
    HoverTool,
    Line,
    PanTool,
    Range1d,
    ResetTool,
    Scatter,
    VSpan,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from megatron_m1.report.charts import COLOURS, GREY, Chart, Curve
from megatron_m1.report.marks import CHECKPOINT, KINDS, RESTART, SKIPPED, STAGE, Mark

HEIGHT = 230
"""Pixels of a chart; its width is the page's."""
TREND_POINTS = 160
"""Of the line through the noise, which is drawn where there are more than twice as many steps."""
MOST_BUCKETS, FEWEST_BUCKETS = 1024, 16
"""Of a curve; a bucket has two points."""
_SYMBOLS = {STAGE: "triangle", RESTART: "diamond", CHECKPOINT: "circle", SKIPPED: "x"}
_TICK = """
const size = Math.abs(tick);
for (const [factor, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
  if (size >= factor) return Number((tick / factor).toPrecision(10)) + unit;
}
const plain = Number(tick.toPrecision(10));
return size > 0 && size < 0.01 ? plain.toExponential() : String(plain);
"""
"""JavaScript: 250K, 0.25, 3e-4. Bokeh's own formatters write a million as 1m, and 3e-4 as 3.000e-4."""
_DIVIDERS = ".bk-divider { background-color: #8884; }"
"""Of the toolbar; its own are white in the dark."""
_EXACT_FLOAT32 = 1 << 24
"""Steps below are whole numbers in fp32."""


def scripts() -> str:
    """Return Bokeh itself, as script elements."""
    return str(Resources(mode="inline", components=["bokeh"]).render_js())


def draw(charts: Sequence[Chart], marks: Sequence[Mark], run_count: int, buckets: int) -> tuple[str, list[str], str]:
    """Draw all charts and the marks.

    Args:
        charts: one figure each.
        marks: drawn in a figure of their own; stages and restarts in all others as well.
        run_count: rows of a kind of mark.
        buckets: of each curve.

    Returns:
        A script element, and the elements in which the charts appear, and the marks; empty without marks.
    """
    ends = [curve.series.extremes(1)[0] for chart in charts for curve in chart.curves]
    first = min((int(steps[0]) for steps in ends), default=0)
    last = max((int(steps[-1]) for steps in ends), default=0)
    margin = max((last - first) * 0.02, 0.5)
    steps = Range1d(first - margin, last + margin, bounds=(first - margin, last + margin), name="steps")
    drawn = {f"chart{number}": _chart(chart, steps, buckets) for number, chart in enumerate(charts)}
    for plot in drawn.values():
        _spans(plot, marks, run_count)
    if marks:
        drawn["marks"] = _marks(marks, run_count, steps)
    document = Document()
    # One by one, each would walk through all before it.
    with document.models.freeze():
        for plot in drawn.values():
            document.add_root(plot)
    script, places = components(drawn)
    return script, [places[f"chart{number}"] for number in range(len(charts))], places.get("marks", "")


def _figure(steps: Range1d, *, is_log: bool = False, height: int = HEIGHT) -> figure:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=steps,
        y_axis_type="log" if is_log else "linear",
        tools=[PanTool(dimensions="width"), BoxZoomTool(dimensions="width"), WheelZoomTool(dimensions="width")],
        toolbar_location="above",
        min_border_right=12,
        output_backend="canvas",
    )
    plot.add_tools(ResetTool())
    plot.toolbar.logo = None
    # The page decides: with a mouse one drags to zoom, with a finger to scroll.
    plot.toolbar.active_drag = plot.toolbar.active_scroll = None
    plot.toolbar.stylesheets = [_DIVIDERS]
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK)
    plot.xaxis.ticker.desired_num_ticks = 5
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
    return plot


def _chart(chart: Chart, steps: Range1d, buckets: int) -> figure:
    is_log = chart.is_log and _spans_decades(chart)
    plot = _figure(steps, is_log=is_log)
    # As much of the axis of values as the steps in sight have.
    plot.window_axis = "x"
    plot.y_range.default_span = 0.2 * _largest(chart) or 1.0
    lines = [
        _points(plot, curve, number, buckets, is_faint=not chart.is_plain) for number, curve in enumerate(chart.curves)
    ]
    for number, curve in enumerate(chart.curves):
        if not chart.is_plain and _is_noisy(curve):
            _trend(plot, curve, number)
    if not is_log:
        plot.yaxis.formatter = CustomJSTickFormatter(code=_TICK)
    form = "0,0.[000000]" if _largest(chart) >= 0.01 else "0.000e+0"
    plot.add_tools(
        HoverTool(
            renderers=lines, mode="vline", tooltips=[("step", "@x{0,0}"), ("value", f"@y{{{form}}}"), ("of", "$name")]
        )
    )
    return plot


def _largest(chart: Chart) -> float:
    return max(float(np.abs(curve.series.extremes(1)[1]).max()) for curve in chart.curves)


def _spans_decades(chart: Chart) -> bool:
    ends = [curve.series.extremes(1)[1] for curve in chart.curves]
    least, greatest = min(values.min() for values in ends), max(values.max() for values in ends)
    # Over less, the ticks of a logarithmic axis run into each other.
    return bool(least > 0 and greatest > 30 * least)


def _is_noisy(curve: Curve) -> bool:
    return not curve.is_marked and curve.series.total() > 2 * TREND_POINTS


def _points(plot: figure, curve: Curve, number: int, buckets: int, *, is_faint: bool) -> GlyphRenderer:
    x, y = curve.series.extremes(buckets)
    source = ColumnDataSource({"x": x.astype(_precision(x)), "y": y.astype(np.float32)})
    alpha, width = (0.3, 1) if is_faint and _is_noisy(curve) else (1.0, 2)
    style = {"line_color": curve.colour, "line_alpha": alpha, "line_width": width}
    line = _glyph(plot, source, Line(x="x", y="y", **style), number)
    line.name = curve.name
    if len(x) == 1 or (curve.is_marked and len(x) <= TREND_POINTS):
        points = Scatter(x="x", y="y", size=7, fill_color=curve.colour, line_color=curve.colour)
        _glyph(plot, source, points, number)
    return line


def _trend(plot: figure, curve: Curve, number: int) -> None:
    x, y = curve.series.means(TREND_POINTS)
    source = ColumnDataSource({"x": x.astype(_precision(x)), "y": y.astype(np.float32)})
    _glyph(plot, source, Line(x="x", y="y", line_color=curve.colour, line_width=2), number)


def _glyph(plot: figure, source: ColumnDataSource, glyph: Glyph, number: int) -> GlyphRenderer:
    # Not plot.line and the like, which make three more of each, for curves that are selected.
    renderer = plot.add_glyph(source, glyph)
    # By which the page's keys know it.
    renderer.tags = [f"curve{number}"]
    return renderer


def _precision(steps: np.ndarray) -> type[np.floating]:
    return np.float64 if len(steps) and steps[-1] >= _EXACT_FLOAT32 else np.float32


def _spans(plot: figure, marks: Sequence[Mark], run_count: int) -> None:
    for kind, dash in ((STAGE, [8, 4]), (RESTART, [2, 5])):
        for number in range(run_count):
            at = [mark.step for mark in marks if (mark.kind, mark.run) == (kind, number)]
            # The first stage begins where everything does.
            at = [step for step in at if step > 1]
            if at:
                colour = COLOURS[number] if run_count > 1 else GREY
                span = VSpan(x="x", line_dash=dash, line_width=1.5, line_alpha=0.9, line_color=colour)
                plot.add_glyph(ColumnDataSource({"x": at}), span)


def _marks(marks: Sequence[Mark], run_count: int, steps: Range1d) -> figure:
    kinds = [kind for kind in KINDS if any(mark.kind == kind for mark in marks)]
    plot = _figure(steps, height=70 + len(kinds) * max(26, 10 * run_count))
    plot.y_range = Range1d(-0.5, max(len(kinds), 1) - 0.5)
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(kinds))))
    plot.yaxis.major_label_overrides = dict(enumerate(kinds))
    plot.ygrid.visible = False
    for kind in kinds:
        found = [mark for mark in marks if mark.kind == kind]
        rows = [kinds.index(kind) + 0.8 * ((run_count - 1) / 2 - mark.run) / run_count for mark in found]
        source = ColumnDataSource(
            {
                "x": [mark.step for mark in found],
                "y": rows,
                "colour": [COLOURS[mark.run] for mark in found],
                "inside": [0.9 if mark.is_kept else 0.0 for mark in found],
                "text": [mark.text for mark in found],
            }
        )
        size = 9 if kind != CHECKPOINT else 7
        plot.scatter(
            "x",
            "y",
            source=source,
            marker=_SYMBOLS[kind],
            size=size,
            line_color="colour",
            fill_color="colour",
            fill_alpha="inside",
            line_width=2 if kind == SKIPPED else 1,
            name=kind,
        )
    plot.add_tools(HoverTool(tooltips=[("step", "@x{0,0}"), ("what", "$name"), ("more", "@text")]))
    return plot
