"""The fields of the tree by dotted path: their types, what is a path, and which one a wrong name may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_m1.config.foreign.answer import answer
from megatron_m1.config.tree import PATH, Config

_LONGEST_NAME = 120
_ALIKE = 0.7
"""Share of equal letters from which one name may be meant by another: ``--ep`` is no ``--help``."""
STAGES = "stages"
"""The one part of the tree that is no group of fields: stages have fields of all groups."""


def field_types(tree: type = Config, prefix: str = "") -> dict[str, Any]:
    """Map every dotted field path below ``tree``, e.g. ``train.max_steps``, to its type annotation."""
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(tree).items():
        if dataclasses.is_dataclass(annotation):
            found |= field_types(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif prefix + name != STAGES:
            found[prefix + name] = annotation
    return found


@functools.cache
def path_fields() -> frozenset[str]:
    """Return the dotted paths of the fields that hold file names."""
    groups = {name: kind for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    return frozenset(
        f"{group}.{field.name}"
        for group, kind in groups.items()
        for field in dataclasses.fields(kind)
        if field.metadata == PATH
    )


def tree_groups() -> set[str]:
    """Names of the groups of the tree."""
    return {path.partition(".")[0] for path in field_types() if "." in path}


def first_field(group: str) -> str:
    """Return the first field of a group."""
    return next(path for path in field_types() if path.startswith(f"{group}."))


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """Return the candidate most like ``name`` in its whole path or its last part, or None when nothing is close."""
    wanted = name.replace("-", "_").lower()
    leaf = wanted.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        last = difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * last)

    best = max(candidates, key=likeness, default=None)
    return best if best is not None and likeness(best) >= _ALIKE else None


def unknown_setting(kind: str, name: str, candidates: Sequence[str], value: object, *, prefix: str = "") -> ValueError:
    """Make the error for a setting that the tree lacks: what another program's means here, else as ``unknown``."""
    given = value if isinstance(value, str) else None
    said = answer(name, given, prefix=prefix)
    return unknown(kind, name, candidates, prefix=prefix) if said is None else ValueError(said)


def unknown(kind: str, name: str, candidates: Sequence[str], *, prefix: str = "") -> ValueError:
    """Make the error for an unknown ``name``, with the nearest of ``candidates`` as the fix."""
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    suggestion = nearest(name, candidates)
    fix = f"did you mean {prefix}{suggestion}?" if suggestion else "--help lists what there is"
    return ValueError(f"unknown {kind} {prefix}{name}: {fix}")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def takes_integer(annotation: Any) -> bool:
    """Whether a field holds an integer, and not also a text or another number."""
    return set(alternatives(annotation)) <= {int, type(None)}


def describe(annotation: Any) -> str:
    """Say in words what values a type takes, e.g. ``an integer or none``."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    words[list[float]] = "a list of numbers such as [0, 0.01]"
    parts = []
    for member in alternatives(annotation):
        if get_origin(member) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(member))))
        else:
            parts.append(words.get(member, "a list such as [a, b]"))
    return " or ".join(parts)
