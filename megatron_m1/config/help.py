"""What ``--help`` says of the configuration tree."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_m1.config.io import field_types, tree_groups, tree_parser
from megatron_m1.config.tree import Config


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
    return text.strip()
