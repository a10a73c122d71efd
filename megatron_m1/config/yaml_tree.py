"""A YAML file of the tree as settings by dotted path."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from megatron_m1.config.fields import describe, field_types, tree_groups, unknown_setting
from megatron_m1.config.older import OLDER
from megatron_m1.printing import shown

_INTEGER_BITS = 63


def flatten(content: Any, prefix: str) -> dict[str, Any]:
    """Turn nested mappings into dotted paths and refuse what the tree does not have."""
    known = field_types()
    groups = tree_groups()
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        where = f"{prefix.rstrip('.')} must hold fields" if prefix else "the top level must hold groups"
        raise ValueError(f"{where} as 'name: value', not {shown(content)}")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{prefix}{key if isinstance(key, str) else shown(key)}"
        if path in groups:
            flat |= flatten(value, f"{path}.")
        elif path in known or path in OLDER:
            _check_plain(path, value, known.get(path, int))
            flat[path] = value
        else:
            raise unknown_setting("key", path, [*known, *groups], value)
    return flat


def _check_plain(path: str, value: Any, annotation: Any) -> None:
    """No field holds more than a list of numbers or texts; aliases within lists may stand for lists without end.

    Raises:
        ValueError: the value is of another kind, or a number that no machine's integer holds.
    """
    items = value if isinstance(value, list) else [value]
    # A path may look like a date.
    if not all(item is None or isinstance(item, (str, int, float, datetime.date)) for item in items):
        raise ValueError(f"{path} = {shown(value)} is not {describe(annotation)}")
    if any(isinstance(item, int) and item.bit_length() > _INTEGER_BITS for item in items):
        raise ValueError(f"{path} = {shown(value)} is too large")
