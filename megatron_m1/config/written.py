"""The configuration tree as a file of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from megatron_m1.config.tree import Config
from megatron_m1.files import write_atomically


def config_text(config: Config) -> str:
    """Return ``config`` as the YAML that ``load_config`` reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=None, width=120)


def write_config(config: Config, path: str | Path) -> None:
    """Write ``config`` as YAML, atomically: the file is complete or is not there."""
    write_atomically(Path(path), config_text(config).encode())
