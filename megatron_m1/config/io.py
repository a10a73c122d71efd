"""Read the configuration tree: preset < YAML file < dotted flags.

Every fault of the user's is one ``ValueError`` whose message is one line that names the value and the fix.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import functools
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from megatron_m1.config.foreign.answer import answer
from megatron_m1.config.numbers import whole_number
from megatron_m1.config.older import OLDER, translate
from megatron_m1.config.paths import expand
from megatron_m1.config.presets import preset_config
from megatron_m1.config.tree import PATH, Config
from megatron_m1.files import regular
from megatron_m1.printing import shown

_LONGEST_NAME = 120
_INTEGER_BITS = 63
NONE_WORDS = ("none", "None", "null", "~")
POWERS_OF_TWO = ("data.seq_length",)
"""Besides the model's fields, those of which nobody knows what ``32K`` is; it is refused."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself lets a key that comes twice overwrite the first in silence.

    Nor does it say where a value stands that is none, such as the date 2001-99-99.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind}" if isinstance(node, yaml.ScalarNode) else f"no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # One that merges other mappings ("<<") may be of exponential size, and groups share no fields.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "this is no name of a field", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key.value)} is there twice: keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def field_types(tree: type = Config, prefix: str = "") -> dict[str, Any]:
    """Map every dotted field path below ``tree``, e.g. ``train.max_steps``, to its type annotation."""
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(tree).items():
        if dataclasses.is_dataclass(annotation):
            found |= field_types(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
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


def _example(group: str) -> str:
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
    return best if best is not None and likeness(best) >= 0.6 else None


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


def parse_config(
    files: Sequence[str | Path],
    flags: Sequence[str],
    preset_name: str | None = None,
    *,
    command_options: Sequence[str] = (),
    base: Config | None = None,
    expand_paths: bool = True,
) -> Config:
    """Build the configuration from a preset, YAML files (later ones win) and dotted flags, in rising precedence.

    Args:
        files: YAML files, each a mapping of the groups of ``Config``.
        flags: command line left after the command's own options: ``--train.max_steps 5`` or ``--train.max_steps=5``.
        preset_name: name given on the command line; None takes the files' ``preset``, else the default one.
        command_options: the command's own options without ``--``, which an unknown flag may have meant.
        base: what files and flags are laid over instead of a preset; its paths are as they stand.
        expand_paths: replace ``~`` and environment variables in paths, as a shell would.

    Raises:
        ValueError: a file can't be read, a key is unknown, a value has the wrong type, or a variable in a path is not
            set.
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= read_yaml(file)
    values |= read_flags(flags, command_options)
    name = str(preset_name or values.get("preset") or (base or Config()).preset)
    tree = _typed({**values, "preset": name}, base or preset_config(name))
    return _expanded(tree, values) if expand_paths else tree


def load_config(path: str | Path) -> Config:
    """Read a configuration that ``write_config`` wrote (any YAML of the tree will do); its paths are as they stand.

    Raises:
        ValueError: as ``parse_config``; or it is no regular file, which a configuration on the command line may be.
    """
    try:
        regular(Path(path))
    except OSError as error:
        raise ValueError(f"config file {path} can't be read: {error.strerror}") from error
    return parse_config([path], [], expand_paths=False)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file of the tree into dotted paths, with older settings in today's terms.

    Raises:
        ValueError: the file can't be read, is no YAML mapping, or has an unknown key.
    """
    try:
        return translate(_flatten(parse_yaml(Path(file).read_text(encoding="utf-8")), ""))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"config file {file} can't be read: {reason}") from error
    except ValueError as error:
        raise ValueError(f"config file {file}: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, in whose mappings no key comes twice.

    Raises:
        ValueError: it is none, or is nested too deeply; one line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError("no valid YAML: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or "a character that YAML does not allow")
        raise ValueError(f"no valid YAML{place}: {problem}") from error


def _flatten(content: Any, prefix: str) -> dict[str, Any]:
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
            flat |= _flatten(value, f"{path}.")
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


def _check_text(path: str, text: str, annotation: Any) -> None:
    """Check a text that is to be read as a number or the like, by a reader which takes YAML's values for granted.

    Raises:
        ValueError: it is no value.
    """
    try:
        parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} = {shown(text)} is not {describe(annotation)}") from error


def read_flags(flags: Sequence[str], command_options: Sequence[str] = ()) -> dict[str, Any]:
    """Read ``--group.field value`` and ``--group.field=value`` pairs; a yes/no field may stand without a value.

    Older settings are returned in today's terms.

    Raises:
        ValueError: an unknown flag (with the nearest one), a flag without a value, or a stray word.
    """
    known = field_types() | dict.fromkeys(OLDER, int)
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        path = flag.removeprefix("--")
        if path == flag:
            raise ValueError(f"unexpected argument {flag!r}: settings are --group.field value")
        if path in tree_groups():
            raise ValueError(f"--{path} is a group of options: give its fields, such as --{_example(path)}")
        if path not in known:
            given = value or next((word for word in rest[:1] if not word.startswith("--")), None)
            raise unknown_setting("option", path, [*field_types(), *command_options], given, prefix="--")
        if not equals:
            follows = bool(rest) and not rest[0].startswith("--")
            if not follows and bool not in alternatives(known[path]):
                raise ValueError(f"--{path} needs a value: {describe(known[path])}")
            value = rest.pop(0) if follows else "true"
        values[path] = value
    return translate(values)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _takes_integer(annotation: Any) -> bool:
    """Whether a field holds an integer, and not also a text or another number."""
    return set(alternatives(annotation)) <= {int, type(None)}


def describe(annotation: Any) -> str:
    """Say in words what values a type takes, e.g. ``an integer or none``."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    parts = []
    for member in alternatives(annotation):
        if get_origin(member) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(member))))
        else:
            parts.append(words.get(member, "a list such as [a, b]"))
    return " or ".join(parts)


def _normalise(value: Any, annotation: Any) -> Any:
    """Bring a YAML or flag value to the form the type checker expects: lists of text, and the words for none."""
    if type(None) in alternatives(annotation) and isinstance(value, str) and value in NONE_WORDS:
        return None
    if annotation != list[str]:
        return value
    if isinstance(value, str):
        text = value.strip()
        try:
            value = parse_yaml(text) if text.startswith("[") else [part for part in text.split(",") if part]
        except ValueError:
            return value
    return [str(item) for item in value] if isinstance(value, list) else value


def _typed(values: Mapping[str, Any], base: Config) -> Config:
    """Lay ``values`` (by dotted path) over ``base`` and check every type."""
    known = field_types()
    tree = dataclasses.asdict(base)
    # A text needs no check, and the one that checks would look for YAML in it.
    texts: dict[str, str] = {}
    for path, raw in values.items():
        value = _normalise(raw, known[path])
        if _takes_integer(known[path]):
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
    return config


def _expanded(config: Config, given: Mapping[str, Any]) -> Config:
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
    parser.add_class_arguments(Config)
    return parser


@functools.cache
def _type_checker() -> jsonargparse.ArgumentParser:
    """Return the parser that checks types; parsing leaves it unchanged, and making one takes 50 ms."""
    return tree_parser()
