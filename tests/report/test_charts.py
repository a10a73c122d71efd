"""Where figures stand, by their names; colours that can be seen on both pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.report import page
from megatron_m1.report.charts import COLOURS, GREY, Chart, charts_of, family_of
from megatron_m1.report.runs import open_runs, read_runs
from tests.report.made_runs import long_records, write_run


def charts(tmp_path: Path, *runs: list[dict[str, Any]]) -> list[Chart]:
    folders = [write_run(tmp_path / f"run{number}", records) for number, records in enumerate(runs)]
    opened = open_runs(folders)
    read_runs(opened)
    return charts_of(opened)


@pytest.mark.parametrize(
    ("name", "title", "label"),
    [
        ("loss", "Loss", ""),
        ("validation_loss", "Loss", "validation"),
        ("validation_loss_code", "Validation loss by source", "code"),
        ("loss_by_source/web_2", "Training loss by source", "source/web 2"),
        ("loss/code", "Training loss by source", "code"),
        ("aux_loss", "Auxiliary loss", ""),
        ("aux_loss_coeff", "Weight of the auxiliary loss", ""),
        ("grad_norm_lightning", "Gradient norm by layer kind", "lightning"),
        ("expert_load_max_over_mean_quarter_3", "Expert load by depth", "quarter 3"),
        ("memory_peak_least_gib", "Peak memory of a rank", "least"),
        ("forward_backward_seconds", "Seconds of a step", "forward backward"),
        ("something_new", "something new", ""),
    ],
)
def test_a_figure_belongs_to_a_family_by_its_name(name: str, title: str, label: str) -> None:
    family, found = family_of(name)
    assert (family.title, found) == (title, label)


def test_one_runs_figures_of_a_family_share_a_chart(tmp_path: Path) -> None:
    found = charts(tmp_path, [*long_records(40), {"step": 40, "something_new": 1.0}])
    assert [(chart.title, [curve.label for curve in chart.curves]) for chart in found] == [
        ("Loss", ["training", "validation"]),
        ("Training loss by source", ["code", "prose"]),
        ("Validation loss by source", ["code"]),
        ("Learning rate", ["last"]),
        ("Gradient norm", ["last"]),
        ("Gradient norm by layer kind", ["lightning", "softmax", "experts"]),
        ("Auxiliary loss", ["last"]),
        ("Expert load", ["last"]),
        ("Expert load by depth", ["quarter 1", "quarter 4"]),
        ("Throughput", ["last"]),
        ("Model FLOPs utilisation (MFU)", ["last"]),
        ("Peak memory of a rank", ["most"]),
        ("Seconds of a step", ["save"]),
        ("something new", ["last"]),
    ]
    assert all(len({curve.colour for curve in chart.curves}) == len(chart.curves) for chart in found)


def test_of_several_runs_each_has_its_colour_everywhere(tmp_path: Path) -> None:
    """Also where one of them does not have a figure."""
    found = charts(tmp_path, long_records(20), [{"step": 1, "tokens": 1, "loss": 2.0, "grad_norm": 1.0}])
    for chart in found:
        for curve in chart.curves:
            assert curve.colour == COLOURS[0 if curve.label.startswith("run0") else 1]
    by_title = {chart.title: [curve.label for curve in chart.curves] for chart in found}
    assert by_title["Loss"] == ["run0: training", "run1: training", "run0: validation"]
    assert by_title["Gradient norm"] == ["run0", "run1"]
    assert by_title["Gradient norm by layer kind: softmax"] == ["run0"]


def test_more_curves_than_colours_stand_in_several_charts(tmp_path: Path) -> None:
    found = charts(tmp_path, [{"step": 1, **{f"loss_{number}": 1.0 for number in range(23)}}])
    assert [len(chart.curves) for chart in found] == [10, 10, 3]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_seen_on_the_light_and_the_dark_page() -> None:
    """As WCAG measures it: 3 for lines, 4.5 for text."""
    template = Path(page.__file__).with_name(page.TEMPLATE).read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", line)) for line in template.splitlines() if ":root {" in line]
    assert [scheme["card"] for scheme in schemes] == ["#ffffff", "#181d24"]
    for scheme in schemes:
        assert [colour for colour in (*COLOURS, GREY) if contrast(colour, scheme["card"]) < 3] == []
        for ink in ("ink", "soft"):
            assert min(contrast(scheme[ink], scheme[ground]) for ground in ("card", "page")) >= 4.5
