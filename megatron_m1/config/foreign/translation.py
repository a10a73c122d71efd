"""From a command line of Megatron-LM to YAML of the tree, with what could not be said and why as comments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, get_origin

import yaml

from megatron_m1.config.check_training import check_optimizer
from megatron_m1.config.fields import alternatives, describe, field_types
from megatron_m1.config.foreign import schedule, shape
from megatron_m1.config.foreign.answer import MEGATRON, find_meaning
from megatron_m1.config.foreign.command_line import CommandLine, Given, read_command_line
from megatron_m1.config.foreign.meaning import Meaning, Unit
from megatron_m1.config.foreign.schedule import Said, Schedule
from megatron_m1.config.foreign.shape import is_whole_shape, translate_shape
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import check_model
from megatron_m1.config.tree import Config
from megatron_m1.config.values import NONE_WORDS
from megatron_m1.printing import cut

_DEFAULTS: dict[str, tuple[str, object]] = {
    "min-lr": ("optimizer.min_lr", 0.0),
    "adam-beta2": ("optimizer.adam_beta2", 0.999),
    "weight-decay": ("optimizer.weight_decay", 0.01),
    "log-interval": ("run.log_interval", 100),
}
"""Megatron-LM's where ours differ: what its command does not say holds all the same."""
_OF_SHAPES: dict[str, tuple[str, object]] = {
    "rotary-base": ("model.rotary_base", 10_000.0),
    "rotary-percent": ("model.rotary_percent", 1.0),
}
"""The same, of commands that describe a model."""
_VARIABLE = "a variable of the shell, which is not known here"


def translate_command(words: Sequence[str]) -> str:
    """Return YAML that ``config.io.read_yaml`` reads.

    Args:
        words: of the command line, the launcher in front included or not.

    Raises:
        ValueError: there is no flag, or a value is none that its flag can have; one line.
    """
    command = read_command_line(words)
    if not command.flags:
        raise ValueError("translate needs a command line of Megatron-LM: megatron-m1 translate -- --num-layers 8 ...")
    said, as_here, unknown = Said(), [], []
    derived = {*schedule.FLAGS, *(shape.FLAGS if is_whole_shape(command) else ()), shape.CHUNKS}
    for name, given in command.flags.items():
        found = find_meaning(name)
        if found is None:
            unknown.append(given.text)
        elif given.has_variable:
            said.unsaid.append(f"{given.text}: {_VARIABLE}{_target(found[1])}")
        elif name not in derived and _translate(found[1], given, said):
            as_here.append(given.text)
    _say_folder(command, said)
    translate_shape(command, said)
    Schedule(command, said).translate()
    _say_defaults(command, said)
    # Without a model in the command, a preset has to give it.
    preset = "m1-456b" if is_whole_shape(command) else "tiny"
    config = _checked(said, preset)
    return "\n".join([*_comments(command, said, as_here, unknown), *_yaml_lines(config, said)]) + "\n"


def _target(row: Meaning) -> str:
    return f"; set {row.field}" if row.field is not None else ""


def _translate(row: Meaning, given: Given, said: Said) -> bool:
    """Say a flag by its row; whether it says what is so here in any case."""
    value = given.values[0] if len(given.values) == 1 else ""
    if row.as_here and len(given.values) < 2 and value in row.as_here:
        return True
    if row.field is None or row.field.startswith("--") or row.unit not in (Unit.SAME, Unit.MINUTES):
        said.unsaid.append(f"{given.text}: {row.why or row.unit.value}")
    elif row.value is not None:
        said.say(row.field, row.value, given.text)
    elif row.unit is Unit.MINUTES:
        said.say(row.field, 60 * float(given.number()), given.text)
    elif field_types()[row.field] == list[str]:
        said.say(row.field, [word for value in given.values for word in value.split()])
    elif len(given.values) > 1 or (not given.values and field_types()[row.field] is not bool):
        raise ValueError(f"{given.text}: give it one value")
    elif given.values and (choices := _choices(row.field)) and given.values[0] not in choices:
        said.unsaid.append(f"{given.text}: {row.field} is {describe(field_types()[row.field])}")
    else:
        said.say(row.field, given.values[0] if given.values else "true")
    return False


def _choices(path: str) -> tuple[str, ...]:
    """Words that a field takes; empty if it takes others as well."""
    members = alternatives(field_types()[path])
    return tuple(str(word) for member in members if get_origin(member) is Literal for word in get_args(member))


def _say_folder(command: CommandLine, said: Said) -> None:
    """Megatron-LM goes on from ``--load``, which is nearly always where it saves; a run here has one folder."""
    save, load = command.known("save"), command.known("load")
    if load is None or len(load.values) != 1:
        return
    reason = next((line for line in said.unsaid if line.startswith(f"{load.text}: ")), None)
    if save is None and "save" not in command.flags:
        said.say("run.folder", load.values[0], load.text)
    elif save is None or save.values != load.values:
        return
    if reason is not None:
        said.unsaid.remove(reason)


def _say_defaults(command: CommandLine, said: Said) -> None:
    for name, (path, value) in {**_DEFAULTS, **(_OF_SHAPES if is_whole_shape(command) else {})}.items():
        if name not in command.flags:
            said.say(path, value, f"{MEGATRON}'s default")
    if not {"bf16", "fp16"} & command.flags.keys():
        said.say("train.precision", "fp32", f"{MEGATRON}'s default")
    if "global-batch-size" not in command.flags:
        said.unsaid.append(
            "(no --global-batch-size) --micro-batch-size x data-parallel size: set train.global_batch_size"
        )


def _checked(said: Said, preset: str) -> Config:
    flags = []
    for path, (value, _) in said.settings.items():
        flags.append(f"--{path}={_flow(value) if isinstance(value, list) else value}")
    config = parse_config([], flags, preset, expand_paths=False)
    check_model(config.model)
    check_optimizer(config.optimizer)
    return config


def _flow(value: object) -> str:
    """One line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000)
    return text.removesuffix("...\n").strip()


def _comments(command: CommandLine, said: Said, as_here: list[str], unknown: list[str]) -> list[str]:
    parts = {
        "not said, and why": said.unsaid,
        "unknown here": unknown,
        "skipped": list(command.strays),
        "so here in any case": [", ".join(as_here)] if as_here else [],
    }
    lines = [f"# From a command line of {MEGATRON}, by megatron-m1 translate."]
    for title, entries in parts.items():
        if entries:
            lines += [f"# {title}:", *(f"#   {cut(entry)}" for entry in entries)]
    return lines


def _yaml_lines(config: Config, said: Said) -> list[str]:
    """Lines of the fields that are said, in the order of the tree, as its reader takes them."""
    lines = [f"preset: {config.preset}"]
    group = ""
    for path in (path for path in field_types() if path in said.settings):
        current, _, name = path.partition(".")
        if current != group:
            lines.append(f"{current}:")
            group = current
        value = getattr(getattr(config, group), name)
        # A text such as "none" stands for nothing, and is written so, unless it is one of the field's own words.
        value = None if isinstance(value, str) and value in NONE_WORDS and value not in _choices(path) else value
        line = f"{name}: {_flow(value)}"
        comment = said.settings[path][1]
        lines.append(f"  {line}" + (f"  # {cut(comment)}" if comment else ""))
    return lines
