"""What a step reports: a figure is declared once, where it is made, and every sink reads from there how to show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number that is reported step by step."""

    name: str
    """Its key in metrics.jsonl, TensorBoard and Weights & Biases; no two figures of a record share one."""
    form: str
    """Its text on the console, with one placeholder, such as ``loss {:.4f}``; empty for what only the records hold."""
    axis: str = "step"
    """Name of what it is drawn over: ``step``, or a figure of the same record (Weights & Biases)."""
    is_count: bool = False
    """Shown as 1.2K, 3.4M and so on."""
    hides_zero: bool = False
    """Not shown on the console while it is 0."""
    alarms: bool = False
    """A step in which it is not finite is shown on the console at once."""
    short: str = ""
    """Its text where a terminal has few columns; empty is ``form``."""
    importance: int = 0
    """Where a terminal has few columns, figures of less importance are left out first."""

    def show(self, value: float | int, *, short: bool = False) -> str:
        """Return the console's text for ``value``."""
        return ((self.short if short else "") or self.form).format(_count(value) if self.is_count else value)


type Record = Mapping[Figure, float | int | None]
"""Figures of one step in the order in which they are shown; None is left out of all but metrics.jsonl."""


def shown(record: Record, columns: int | None = None) -> str:
    """Return what a console line says of ``record``.

    Args:
        record: figures in their order.
        columns: a longer line would wrap in the middle of a number: texts are shortened, then the figures that matter
            least left out, all but one. None has room for everything.
    """
    kept = [
        (figure, value)
        for figure, value in record.items()
        if figure.form and value is not None and not (figure.hides_zero and value == 0)
    ]
    text = " | ".join(figure.show(value) for figure, value in kept)
    while columns is not None and len(text) > columns:
        short = " | ".join(figure.show(value, short=True) for figure, value in kept)
        if short != text:
            text = short
            continue
        if len(kept) <= 1:
            break
        kept.remove(min(reversed(kept), key=lambda pair: pair[0].importance))
        text = " | ".join(figure.show(value, short=True) for figure, value in kept)
    return text


def alarms(record: Record) -> bool:
    """Whether a figure that alarms is not finite."""
    return any(figure.alarms and value is not None and not math.isfinite(value) for figure, value in record.items())


def _count(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"
