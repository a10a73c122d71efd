"""Values of fields: brought to their types, laid over a tree, and paths expanded."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jsonargparse

from megatron_m1.config.fields import STAGES, alternatives, describe, field_types, path_fields, takes_integer
from megatron_m1.config.numbers import whole_number
from megatron_m1.config.paths import expand
from megatron_m1.config.tree import Config
from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.printing import shown

NONE_WORDS = ("none", "None", "null", "~")
POWERS_OF_TWO = ("data.seq_length",)
"""Besides the model's fields, those of which nobody knows what ``32K`` is; it is refused."""


def _check_text(path: str, text: str, annotation: Any) -> None:
    """Check a text that is to be read as a number or the like, by a reader which takes YAML's values for granted.

    Raises:
        ValueError: it is no value.
    """
    try:
        parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} = {shown(text)} is not {describe(annotation)}") from error


def _normalise(path: str, value: Any, annotation: Any) -> Any:
    """Bring a YAML or flag value to the form the type checker expects: lists of text, and the words for none."""
    if type(None) in alternatives(annotation) and isinstance(value, str) and value in NONE_WORDS:
        return None
    if annotation not in (list[str], list[float]):
        return value
    if isinstance(value, str):
        text = value.strip()
        try:
            value = parse_yaml(text) if text.startswith("[") else [part for part in text.split(",") if part]
        except ValueError:
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_number(path, item) if annotation == list[float] else str(item) for item in value]


def _number(path: str, item: Any) -> Any:
    """Read a number of a list, which may be spelt as a count is; what is none is left to whoever checks types."""
    item = whole_number(path, item, counts=True)
    try:
        return float(item) if isinstance(item, str) else item
    except ValueError:
        return item


def typed(values: Mapping[str, Any], base: Config) -> Config:
    """Lay ``values`` (by dotted path) over ``base`` and check every type."""
    known = field_types()
    tree = dataclasses.asdict(base)
    del tree[STAGES]
    # A text needs no check, and the one that checks would look for YAML in it.
    texts: dict[str, str] = {}
    for path, raw in values.items():
        value = _normalise(path, raw, known[path])
        if takes_integer(known[path]):
            value = whole_number(path, value, counts=path not in POWERS_OF_TWO and not path.startswith("model."))
        if isinstance(value, str):
            if str in alternatives(known[path]):
                texts[path] = value
                continue
            _check_text(path, value, known[path])
        if value is None and type(None) not in alternatives(known[path]):
            raise ValueError(f"{path} has no value; it takes {describe(known[path])}")
        group, _, name = path.rpartition(".")
        (tree[group] if group else tree)[name] = value
    parser = _type_checker()
    try:
        config = Config(**vars(parser.instantiate(parser.parse_object(tree))))
    except argparse.ArgumentError as error:
        match = re.search(r'Parser key "([\w.]+)"', str(error))
        if match is None or match.group(1) not in values:
            raise ValueError(str(error).replace("\n", " ")) from error
        path = match.group(1)
        raise ValueError(f"{path} = {shown(values[path])} is not {describe(known[path])}") from error
    for path, text in texts.items():
        group, _, name = path.rpartition(".")
        setattr(getattr(config, group) if group else config, name, text)
    config.stages = copy.deepcopy(base.stages)
    return config


def expanded(config: Config, given: Mapping[str, Any]) -> Config:
    """Expand the paths among the fields that were given."""
    for path in sorted(path_fields() & given.keys()):
        group, _, name = path.partition(".")
        value = getattr(getattr(config, group), name)
        try:
            if isinstance(value, str):
                value = expand(value)
            elif value is not None:
                value = [expand(item) for item in value]
        except ValueError as error:
            raise ValueError(f"{path} = {error}") from error
        setattr(getattr(config, group), name, value)
    return config


def tree_parser() -> jsonargparse.ArgumentParser:
    """Return a parser that holds one typed and documented option for every field."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False, add_help=False, default_env=False, usage=argparse.SUPPRESS
    )
    parser.add_class_arguments(Config, skip={STAGES})
    return parser


@functools.cache
def _type_checker() -> jsonargparse.ArgumentParser:
    """Return the parser that checks types; parsing leaves it unchanged, and making one takes 50 ms."""
    return tree_parser()
