"""The configuration as files of a run: what was asked, and beside it what that became.

``config.yaml`` starts another run as this one was started, on any machine: ``auto`` is ``auto`` in it.
``resolved.yaml`` has the same tree with nothing left to derive, as this machine and this world had it, and says where
the folder was. ``starts.jsonl`` keeps that tree of every start, which the two files forget.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_m1.config.fields import STAGES
from megatron_m1.config.io import load_config
from megatron_m1.config.portable import located, portable
from megatron_m1.config.resolved import ResolvedConfig
from megatron_m1.config.stage_list import stage_entry
from megatron_m1.config.tree import Config
from megatron_m1.files import write_atomically

CONFIG = "config.yaml"
RESOLVED = "resolved.yaml"
STARTS = "starts.jsonl"
"""One line for each time that the run, or a stage of it, began to train."""


@dataclass(frozen=True)
class SavedConfig:
    """A configuration as a run or a checkpoint has it, with paths that can be opened from here."""

    asked: Config
    became: Config
    """With nothing left to derive. Runs of older versions kept only this: it is ``asked`` as well."""


def tree_values(config: Config) -> dict[str, Any]:
    """Return the tree as plain values, also of a resolved configuration."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config) if field.name != STAGES}
    values = {name: dataclasses.asdict(group) if name != "preset" else group for name, group in groups.items()}
    # Only where there are some: then the files of a run without stages are those of older versions, too.
    return values | ({STAGES: [stage_entry(stage) for stage in config.stages]} if config.stages else {})


def config_text(config: Config) -> str:
    """Return ``config`` as the YAML that ``load_config`` reads."""
    return yaml_text(tree_values(config))


def yaml_text(content: dict[str, Any]) -> str:
    """Return the tree's plain values as YAML; files of a run are known by being spelt so."""
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return text


def write_config(config: Config, path: str | Path) -> None:
    """Write ``config`` as YAML, atomically: the file is complete or is not there."""
    write_atomically(Path(path), config_text(config).encode())


def saved_texts(config: Config, folder: Path) -> dict[str, str]:
    """Return the files, by name, that tell in a run's folder and in its checkpoints how it is configured.

    Args:
        config: of the run. If it is resolved, there is ``RESOLVED`` as well.
        folder: the run's.
    """
    if not isinstance(config, ResolvedConfig):
        return {CONFIG: config_text(portable(config, folder))}
    return {
        CONFIG: config_text(portable(config.asked, folder)),
        RESOLVED: yaml_text(resolved_values(config, folder)),
    }


def resolved_values(config: Config, folder: Path) -> dict[str, Any]:
    """Return what ``RESOLVED`` and a line of ``STARTS`` have of the run in ``folder``: its resolved tree, plain."""
    became = portable(config, folder)
    became.run.folder = os.path.abspath(folder)
    return tree_values(became)


def read_saved(place: Path, folder: Path) -> SavedConfig:
    """Read what ``saved_texts`` returned.

    Args:
        place: the run's folder, or a checkpoint.
        folder: the run's.

    Raises:
        ValueError: as ``load_config``.
    """
    asked = load_config(place / CONFIG)
    if not (place / RESOLVED).exists():
        asked = located(asked, folder)
        return SavedConfig(asked, asked)
    became = load_config(place / RESOLVED)
    was = Path(became.run.folder)
    became.run.folder = asked.run.folder
    return SavedConfig(located(asked, folder, was), located(became, folder, was))
