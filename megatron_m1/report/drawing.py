"""Charts as Bokeh figures, which share one axis of steps. The only file that imports Bokeh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    TickFormatter,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from megatron_m1.report.charts import COLOURS, Chart, Curve
from megatron_m1.report.marks import CHECKPOINT, KINDS, RESTART, SKIPPED, STAGE, Mark

HEIGHT = 230
"""Pixels of a chart; its width is the page's."""
TREND_POINTS = 160
"""Of the line through the noise, which is drawn where there are more than twice as many steps."""
MOST_BUCKETS, FEWEST_BUCKETS = 1024, 16
"""Of a curve; a bucket has two points."""
_SYMBOLS = {STAGE: "triangle", RESTART: "diamond", CHECKPOINT: "circle", SKIPPED: "x"}
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
        A script element, and the elements in which the charts appear, and the marks.
    """
    ends = [curve.series.extremes(1)[0] for chart in charts for curve in chart.curves]
    first = min((int(steps[0]) for steps in ends), default=0)
    last = max((int(steps[-1]) for steps in ends), default=0)
    margin = max((last - first) * 0.02, 0.5)
    steps = Range1d(first - margin, last + margin, bounds=(first - margin, last + margin), name="steps")
    drawn = {f"chart{number}": _chart(chart, steps, buckets) for number, chart in enumerate(charts)}
    for plot in drawn.values():
        _spans(plot, marks)
    drawn["marks"] = _marks(marks, run_count, steps)
    script, places = components(drawn)
    return script, [places[f"chart{number}"] for number in range(len(charts))], places["marks"]


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
    plot.toolbar.active_drag = plot.tools[1]
    plot.toolbar.active_scroll = None
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")
    plot.xaxis.ticker.desired_num_ticks = 5
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
    return plot


def _chart(chart: Chart, steps: Range1d, buckets: int) -> figure:
    is_log = chart.is_log and all(curve.series.extremes(1)[1].min() > 0 for curve in chart.curves)
    plot = _figure(steps, is_log=is_log)
    # As much of the axis of values as the steps in sight have.
    plot.window_axis = "x"
    for number, curve in enumerate(chart.curves):
        _curve(plot, curve, number, buckets, has_trend=not chart.is_plain)
    if not is_log:
        plot.yaxis.formatter = _formatter(chart)
    shown = [renderer for renderer in plot.renderers if "raw" in renderer.tags]
    label = HoverTool(renderers=shown, mode="vline", tooltips=[("step", "@x{0,0}"), ("$name", "@y{0,0.[000000]}")])
    if all(curve.series.extremes(1)[1].max() < 0.01 for curve in chart.curves):
        label.tooltips = [("step", "@x{0,0}"), ("$name", "@y{0.000e+0}")]
    plot.add_tools(label)
    return plot


def _formatter(chart: Chart) -> TickFormatter:
    largest = max(float(np.abs(curve.series.extremes(1)[1]).max()) for curve in chart.curves)
    if largest >= 1000:
        return NumeralTickFormatter(format="0.[00]a")
    return NumeralTickFormatter(format="0.[000]" if largest >= 0.01 else "0.[0]e+0")


def _curve(plot: figure, curve: Curve, number: int, buckets: int, *, has_trend: bool) -> None:
    x, y = curve.series.extremes(buckets)
    precise = np.float64 if len(x) and x[-1] >= _EXACT_FLOAT32 else np.float32
    source = ColumnDataSource({"x": x.astype(precise), "y": y.astype(np.float32)})
    is_noisy = has_trend and not curve.is_marked and curve.series.total() > 2 * TREND_POINTS
    tags = [f"curve{number}", "raw"]
    style = {"line_color": curve.colour, "line_alpha": 0.35 if is_noisy else 1.0, "line_width": 1 if is_noisy else 2}
    plot.line("x", "y", source=source, name=curve.label, tags=tags, **style)
    if len(x) == 1 or (curve.is_marked and len(x) <= TREND_POINTS):
        plot.scatter("x", "y", source=source, size=5, color=curve.colour, tags=[f"curve{number}"])
    if is_noisy:
        mean_x, mean_y = curve.series.means(TREND_POINTS)
        means = ColumnDataSource({"x": mean_x.astype(precise), "y": mean_y.astype(np.float32)})
        plot.line("x", "y", source=means, line_color=curve.colour, line_width=2, tags=[f"curve{number}"])


def _spans(plot: figure, marks: Sequence[Mark]) -> None:
    for kind, dash in ((STAGE, "dashed"), (RESTART, "dotted")):
        at = [mark.step for mark in marks if mark.kind == kind]
        # The first stage begins where everything does.
        at = [step for step in at if step > 1]
        if at:
            plot.vspan(x=at, line_dash=dash, line_width=1, line_alpha=0.7, tags=["span"])


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
    plot.add_tools(HoverTool(tooltips=[("$name", "step @x{0,0}"), ("", "@text")]))
    return plot
