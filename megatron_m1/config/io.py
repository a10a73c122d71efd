"""Read the configuration tree: preset < YAML file < dotted flags.

Every fault of the user's is one ``ValueError`` whose message is one line that names the value and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_m1.config.fields import (
    STAGES,
    alternatives,
    describe,
    field_types,
    first_field,
    tree_groups,
    unknown_setting,
)
from megatron_m1.config.older import OLDER, translate
from megatron_m1.config.presets import preset_config
from megatron_m1.config.stage_list import FLAG, read_stages, stage_field, typed_stages, with_flags
from megatron_m1.config.tree import Config
from megatron_m1.config.values import expanded, typed
from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.config.yaml_tree import flatten
from megatron_m1.files import regular


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
    origins: dict[str, str | Path] = {}
    for file in files:
        read = read_yaml(file)
        values |= read
        origins |= dict.fromkeys(read, file)
    given = read_flags(flags, command_options)
    stages = with_flags(values.pop(STAGES, base.stages if base else []), given)
    values |= {path: value for path, value in given.items() if not path.startswith(FLAG)}
    name = str(preset_name or values.get("preset") or (base or Config()).preset)
    try:
        tree = typed({**values, "preset": name}, base or preset_config(name))
    except ValueError as error:
        path = str(error).partition(" ")[0]
        if path not in origins or path in given:
            raise
        raise ValueError(f"config file {origins[path]}: {error}") from error
    tree.stages = typed_stages(stages, tree, expand_paths=expand_paths)
    return expanded(tree, values) if expand_paths else tree


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
    """Read a YAML file of the tree into dotted paths, with older settings in today's terms; ``stages`` is a list.

    Raises:
        ValueError: the file can't be read, is no YAML mapping, or has an unknown key.
    """
    try:
        content = parse_yaml(Path(file).read_text(encoding="utf-8"))
        stages = {STAGES: read_stages(content[STAGES])} if isinstance(content, Mapping) and STAGES in content else {}
        rest = {key: value for key, value in content.items() if key != STAGES} if stages else content
        return translate(flatten(rest, "")) | stages
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"config file {file} can't be read: {reason}") from error
    except ValueError as error:
        raise ValueError(f"config file {file}: {error}") from error


def read_flags(flags: Sequence[str], command_options: Sequence[str] = ()) -> dict[str, Any]:
    """Read ``--group.field value`` and ``--group.field=value`` pairs; a yes/no field may stand without a value.

    Older settings are returned in today's terms; ``--stages.NAME.group.field`` has that path.

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
            raise ValueError(f"--{path} is a group of options: give its fields, such as --{first_field(path)}")
        kind = known.get(path)
        if path.startswith(FLAG):
            _, field = stage_field(path)
            kind = known.get(field, int)
        if kind is None:
            given = value or next((word for word in rest[:1] if not word.startswith("--")), None)
            raise unknown_setting("option", path, [*field_types(), *command_options], given, prefix="--")
        if not equals:
            follows = bool(rest) and not rest[0].startswith("--")
            if not follows and bool not in alternatives(kind):
                raise ValueError(f"--{path} needs a value: {describe(kind)}")
            value = rest.pop(0) if follows else "true"
        values[path] = value
    return translate(values)
