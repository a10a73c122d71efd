"""Answer a flag of another program with the field that says it here, or with the reason why none does."""

from __future__ import annotations

from functools import cache

from megatron_m1.config.foreign.meaning import Meaning, Unit, normal_name
from megatron_m1.config.foreign.megatron_model import MODEL
from megatron_m1.config.foreign.megatron_run import RUN
from megatron_m1.config.foreign.torchtitan import TORCHTITAN

MEGATRON, TITAN = "Megatron-LM", "torchtitan"
TABLES = {MEGATRON: (*MODEL, *RUN), TITAN: TORCHTITAN}
"""Rows by the program that they are of."""


@cache
def _rows() -> dict[str, tuple[str, Meaning]]:
    return {row.flag: (program, row) for program, rows in TABLES.items() for row in rows}


def find_meaning(name: str) -> tuple[str, Meaning] | None:
    """Return the program that has this flag, and what it means; None if no table has it.

    Args:
        name: with its dashes or without, words joined by dashes or underscores; a field's whole path or a bare name.
    """
    rows = _rows()
    whole = normal_name(name)
    return rows.get(whole) or rows.get(whole.rpartition(".")[2])


def answer(name: str, value: str | None = None, *, prefix: str = "--") -> str | None:
    """Say in one line what a flag of another program is called here; None for a flag that no table has.

    Args:
        name: as of ``find_meaning``.
        value: what it was given, if that is known.
        prefix: of names: those in files have no dashes.
    """
    found = find_meaning(name)
    if found is None:
        return None
    program, row = found
    spelled = f"{prefix}{name.removeprefix('--')}"
    is_theirs = normal_name(name) == row.flag
    of = f"{spelled} is {program}'s" if is_theirs else f"there is no {spelled}, and {program}'s --{row.flag}"
    if row.field is None:
        return f"{of}{', and' if is_theirs else ''} {'needs' if row.as_here else 'has'} no field here: {row.why}"
    target = row.field if row.field.startswith("--") else f"{prefix}{row.field}"
    if row.value is not None:
        target += f" {row.value}"
    elif row.unit is Unit.MINUTES and value is not None and _is_number(value):
        target += f" {60 * float(value):g}"
    more = [words for words in (row.unit.value, row.why) if words]
    here = ": here it is" if is_theirs else " is here"
    return f"{of}{here} {target}" + (f", {'; '.join(more)}" if more else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
