"""Integers as people write counts: ``1e9``, ``65_536``, ``500M``, ``1.5B``, ``2T``.

YAML 1.2 reads ``1e9`` as a number and PyYAML, which knows 1.1, as a text: both give the same count here.
"""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_m1.printing import shown

POWERS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""What a count may end in, small or capital letters."""
_COUNT = re.compile(r"([+-]?\d{1,40}(?:_\d{1,40})*(?:\.\d{1,40})?(?:[eE][+-]?\d{1,3})?)\s?([KMBTkmbt]?)", re.ASCII)
_LARGEST = 10**18
"""What is larger counts nothing, and fits no machine's integer."""


def whole_number(name: str, value: object, *, counts: bool) -> object:
    """Return the integer that ``value`` spells in one of these ways; anything else as it is, for others to judge.

    Args:
        name: what it is called, for the message.
        value: from YAML or from the command line.
        counts: whether it counts something in thousands. What is usually a power of two (the tokens of a pack, rows,
            widths) takes no ``K``: nobody knows whether 32K is 32,000 or 32,768.

    Raises:
        ValueError: it has an ending that it may not have, is no whole number, or is too large; one line.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST:
        return int(value)
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    number, power = Decimal(match[1].replace("_", "")), match[2].upper()
    if power and not counts:
        raise ValueError(f"{name} = {shown(value)}{_readings(number, power)}")
    number *= POWERS.get(power, 1)
    if abs(number) > _LARGEST:
        raise ValueError(f"{name} = {shown(value)} is too large")
    if number != number.to_integral_value():
        # 1.5 by itself is called what it is by whoever checks types.
        if not power:
            return value
        raise ValueError(f"{name} = {shown(value)} is {number.normalize():f}: give a whole number")
    return int(number)


def _readings(number: Decimal, power: str) -> str:
    """What may be meant where endings are not taken."""
    binary = 1024 ** (1 + list(POWERS).index(power))
    readings = [number * POWERS[power], number * binary]
    if any(abs(reading) > _LARGEST or reading != reading.to_integral_value() for reading in readings):
        return f": {power} stands for no number here: write it out"
    decimal, power_of_two = map(int, readings)
    return f": {power} may stand for two numbers here: write {decimal} or {power_of_two}"
