"""Which figures stand in which chart: by their names, so that figures that are not known yet have a place as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_m1.report.records import COUNTS
from megatron_m1.report.runs import Run
from megatron_m1.report.series import Series

LOSS, OPTIMIZER, EXPERTS, SPEED, MEMORY, OTHER = "Loss", "Optimizer", "Experts", "Speed", "Memory and time", "Other"
SECTIONS = (LOSS, OPTIMIZER, EXPERTS, SPEED, MEMORY, OTHER)
COLOURS = (
    "#3b82f6",
    "#ea580c",
    "#059669",
    "#db2777",
    "#8b5cf6",
    "#0891b2",
    "#a16207",
    "#dc2626",
    "#64748b",
    "#4d7c0f",
)
"""Each has a contrast of 3 or more with the page, light and dark."""
GREY = "#7a8594"
"""Of lines that are no run's; the same holds."""


@dataclass(frozen=True)
class Family:
    """Figures that belong together; the group of the pattern, if it matches, is what tells them apart."""

    pattern: str
    title: str
    unit: str
    section: str
    is_log: bool = False
    is_plain: bool = False
    """Without noise: a trend would draw it twice."""
    whole: str = "last"
    """Label of the figure that the group does not match."""


_BY = r"(?:_by)?[_/.:](.+)"
FAMILIES = (
    Family("loss|(validation)_loss", "Loss", "nats per token", LOSS, whole="training"),
    Family(f"loss{_BY}", "Training loss by source", "nats per token", LOSS),
    Family(f"validation_loss{_BY}", "Validation loss by source", "nats per token", LOSS),
    Family("lr", "Learning rate", "", OPTIMIZER, is_plain=True),
    Family(f"lr{_BY}", "Learning rate by group", "", OPTIMIZER, is_plain=True),
    Family("grad_norm", "Gradient norm", "before clipping", OPTIMIZER, is_log=True),
    Family(f"grad_norm{_BY}", "Gradient norm by layer kind", "before clipping", OPTIMIZER, is_log=True),
    Family("aux_loss", "Auxiliary loss", "1 at balance", EXPERTS),
    Family("aux_loss_coeff", "Weight of the auxiliary loss", "", EXPERTS, is_plain=True),
    Family("expert_load_max_over_mean", "Expert load", "most loaded over mean", EXPERTS),
    Family(f"expert_load_max_over_mean{_BY}", "Expert load by depth", "most loaded over mean", EXPERTS),
    Family("expert_load_entropy", "Expert load, entropy", "1 at balance", EXPERTS),
    Family(f"expert_load_entropy{_BY}", "Expert load by depth, entropy", "1 at balance", EXPERTS),
    Family("dropped_share", "Dropped choices", "share of 1", EXPERTS),
    Family(f"dropped_share{_BY}", "Dropped choices by depth", "share of 1", EXPERTS),
    Family("tokens_per_second", "Throughput", "tokens/s", SPEED),
    Family("mfu", "Model FLOPs utilisation (MFU)", "share of the peak", SPEED),
    Family("model_tflops_per_device", "Useful work per device", "TFLOP/s", SPEED),
    Family("memory_peak(?:_(.+))?_gib", "Peak memory of a rank", "GiB", MEMORY, is_plain=True, whole="most"),
    Family("(.+)_seconds", "Seconds of a step", "s", MEMORY),
)


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    name: str
    """Said at a point of it: the figure of one run, or the run."""
    label: str
    colour: str
    series: Series
    is_marked: bool = False
    """Drawn with its points: they are few, and each counts."""


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes."""

    title: str
    unit: str
    section: str
    curves: list[Curve]
    is_log: bool
    is_plain: bool


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Arrange what runs have recorded. One run's figures of a family share a chart; of several runs each has its own,
    in which a run has its colour.
    """
    names = [name for name in dict.fromkeys(n for run in runs for n in run.records.figures) if name not in COUNTS]
    groups: dict[Family, dict[str, str]] = {}
    for name in names:
        family, label = family_of(name)
        groups.setdefault(family, {})[name] = label
    order = [*FAMILIES, *(family for family in groups if family not in FAMILIES)]
    charts = []
    for family in order:
        members = groups.get(family)
        if members is None:
            continue
        if len(runs) == 1 or family is FAMILIES[0]:
            charts += _together(family, members, runs)
        else:
            charts += [_of_one(family, name, label, runs) for name, label in members.items()]
    return sorted(charts, key=lambda chart: SECTIONS.index(chart.section))


def family_of(name: str) -> tuple[Family, str]:
    """Return the family of a figure and what tells it from the others; a family of its own if none is known."""
    for family in FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match:
            label = next((group for group in match.groups() if group), "")
            return family, label.replace("_", " ")
    return Family(re.escape(name), name.replace("_", " "), "", OTHER), ""


def _together(family: Family, members: dict[str, str], runs: Sequence[Run]) -> list[Chart]:
    """Charts of all members, no more in each than there are colours."""
    charts = []
    names = sorted(members, key=lambda name: members[name] != "") if family is FAMILIES[0] else list(members)
    for first in range(0, len(names), len(COLOURS)):
        curves = []
        for number, name in enumerate(names[first : first + len(COLOURS)]):
            for run, run_colour in zip(runs, COLOURS, strict=False):
                series = run.records.figures.get(name)
                if series is None:
                    continue
                marked = name.startswith("validation")
                alone = len(runs) == 1
                label = members[name] or family.whole
                curves.append(
                    Curve(
                        name=name if alone else f"{run.name}: {name}",
                        label=label if alone else f"{run.name}: {label}",
                        colour=COLOURS[number] if alone else run_colour,
                        series=series,
                        is_marked=marked,
                    )
                )
        charts.append(Chart(family.title, family.unit, family.section, curves, family.is_log, family.is_plain))
    return charts


def _of_one(family: Family, name: str, label: str, runs: Sequence[Run]) -> Chart:
    curves = [
        Curve(run.name, run.name, colour, run.records.figures[name], is_marked=name.startswith("validation"))
        for run, colour in zip(runs, COLOURS, strict=False)
        if name in run.records.figures
    ]
    title = f"{family.title}: {label}" if label else family.title
    return Chart(title, family.unit, family.section, curves, family.is_log, family.is_plain)
