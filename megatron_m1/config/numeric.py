"""Checks of numbers that fields hold."""

from __future__ import annotations

import math


def check_positive(group: str, values: object, names: list[str]) -> None:
    """Check that fields of ``values`` that are not None are finite and above 0; ``group`` names them.

    Raises:
        ValueError: one is not; one line.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{group}.{name} = {value}: it must be a finite number above 0")


def check_not_negative(group: str, values: object, names: list[str]) -> None:
    """Check that fields of ``values`` that are not None are finite, and 0 or above; ``group`` names them.

    Raises:
        ValueError: one is not; one line.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{group}.{name} = {value}: it must be a finite number, 0 or above")
