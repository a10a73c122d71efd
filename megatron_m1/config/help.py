"""What ``--help`` says of the configuration tree."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_m1.config.fields import field_types, tree_groups
from megatron_m1.config.tree import Config
from megatron_m1.config.values import tree_parser

_STAGES = """\
stages:
  A YAML file may list stages, parts of the run by the tokens that they train on. What a stage does not name it has from
  the one before it, the first from the groups above:
    stages:
      - {name: short, tokens: 7.2T}
      - {name: long, tokens: 300B, data: {seq_length: 131072}, model: {rotary_base: 5.0e+6}}
  On the command line, --stages.NAME.GROUP.FIELD VALUE and --stages.NAME.tokens N change one of them."""


def tree_help(base: Config) -> str:
    """Explain every field: its docstring, its type and its value in ``base``."""
    parser = tree_parser()
    values = dataclasses.asdict(base)
    for path in field_types():
        group, _, name = path.rpartition(".")
        if group:
            parser.set_defaults({path: values[group][name]})
    groups = tree_groups()
    for action in parser._actions:
        if action.dest in groups or action.dest == "preset":
            action.help = argparse.SUPPRESS
    text: str = parser.format_help()
    return f"{text.strip()}\n\n{_STAGES}"
