"""The rooms' import rules: which folder may import what.

Read from the sources and not with import-linter, whose graph has no names that are imported as strings, no bare room
names and no exceptions by file name, and which imports what it checks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU_EXTRAS = ("transformer_engine", "apex", "flash_attn")
BARE_ROOMS = ("kernels", "parallel", "data")
"""``kernels`` belongs to another package on the index; the rooms are imported below ``megatron_m1`` only."""


@dataclass(frozen=True)
class Rule:
    """What the files of a folder must not import."""

    folder: str
    forbidden: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    """Exceptions within ``forbidden``."""
    exempt: str = ""
    """Glob of file names to which the rule does not apply."""


RULES = [
    Rule("kernels", ("torch.distributed", "megatron", "megatron_m1"), ("megatron_m1.kernels",)),
    Rule("kernels", ("triton",), exempt="triton_*.py"),
    Rule("parallel", ("megatron", "triton", "megatron_m1"), ("megatron_m1.parallel", "megatron_m1.kernels")),
    Rule(
        "data",
        ("megatron", "triton", "megatron_m1"),
        (
            "megatron.core.datasets",
            "megatron.core.tokenizers",
            "megatron_m1.data",
            "megatron_m1.files",
            "megatron_m1.cores",
            "megatron_m1.printing",
        ),
    ),
    Rule("megatron_m1", ("triton", "examples", "tests", "benchmarks")),
    Rule("megatron_m1", GPU_EXTRAS, exempt="providers.py"),
    Rule("tests/reference", ("megatron", "megatron_m1", "triton", *GPU_EXTRAS)),
    Rule("benchmarks", ("tests",)),
    *(Rule(folder, GPU_EXTRAS) for folder in BARE_ROOMS),
    *(Rule(folder, BARE_ROOMS) for folder in (*BARE_ROOMS, "megatron_m1", "tests", "benchmarks")),
]


FLOORS = (
    "files cores printing",
    "config.tree",
    "config.resolved",
    "shapes",
    "config",
    "plan launch",
    "runtime layers",
    "model",
    "evaluation.ngrams",
    "checkpoint",
    "convert report",
    "training generate",
    "library",
    "evaluation",
    "commands",
    "cli",
)
"""The rooms inside ``megatron_m1``, from the ground up: a file imports its own room and lower floors.

Two rooms have several floors: kinds of layers read the trees of configuration, whose rules (``config.resolve``) ask
them; and a run compares its loss with n-gram models, while other evaluations use what runs are made of.
"""


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of everything that ``source`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    """Tell whether ``name`` is one of ``packages`` or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def breaches(rule: Rule, source: str) -> list[tuple[int, str]]:
    """Return the imports of ``source`` that ``rule`` does not allow."""
    return [
        (line, name)
        for line, name in imports_of(source)
        if name == "relative import" or (is_within(name, rule.forbidden) and not is_within(name, rule.allowed))
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.folder} never {rule.forbidden[0]}")
def test_room_imports_only_what_it_may(rule: Rule) -> None:
    found = []
    for path in sorted((ROOT / rule.folder).rglob("*.py")):
        if rule.exempt and path.match(rule.exempt):
            continue
        for line, name in breaches(rule, path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not found, "\n".join(found)


def room_of(dotted: str) -> str:
    """``megatron_m1.config.io`` is in ``config``, ``megatron_m1.cli`` is a room of its own, and so is the tree."""
    first, *rest = dotted.split(".")[1:]
    return f"{first}.{rest[0]}" if rest and f"{first}.{rest[0]}" in FLOORS else first


def test_no_import_runs_upward() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    found = []
    for path in sorted((ROOT / "megatron_m1").rglob("*.py")):
        if path == ROOT / "megatron_m1" / "__init__.py":
            continue
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for line, name in imports_of(path.read_text(encoding="utf-8")):
            if not name.startswith("megatron_m1.") or room_of(name) in (room, *BARE_ROOMS):
                continue
            if floor[room_of(name)] >= floor[room]:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import megatron.core",
        "from megatron import core",
        "def f():\n    from megatron_m1 import model",
        "from megatron_m1.data.packed import PackedSample",
        "import importlib\nimportlib.import_module('megatron.core')",
        "from . import layout",
    ],
)
def test_a_breach_is_seen(source: str) -> None:
    rule = Rule("parallel", ("megatron", "megatron_m1"), ("megatron_m1.parallel",))
    assert len(breaches(rule, source)) == 1


def test_an_exception_is_no_breach() -> None:
    rule = Rule("parallel", ("megatron", "megatron_m1"), ("megatron_m1.parallel",))
    assert breaches(rule, "from megatron_m1.parallel import layout\nfrom torch import distributed") == []


def test_every_package_is_installed() -> None:
    """``setup.py`` names each folder with an ``__init__.py``: what it forgets is missing in a wheel alone."""
    listed = (ROOT / "setup.py").read_text(encoding="utf-8")
    for room in ("megatron_m1", *BARE_ROOMS):
        for marker in sorted((ROOT / room).rglob("*/__init__.py")):
            if marker.parent.is_symlink():
                continue
            dotted = ".".join(marker.parent.relative_to(ROOT).parts)
            name = dotted if room == "megatron_m1" else f"megatron_m1.{dotted}"
            assert f'"{name}"' in listed, f"{name} is missing in setup.py's PACKAGES"


def test_an_editor_finds_the_rooms() -> None:
    """Editors resolve names by folders: ``megatron_m1.kernels`` is looked for in ``megatron_m1/``."""
    for room in BARE_ROOMS:
        assert (ROOT / "megatron_m1" / room).samefile(ROOT / room)


def test_every_dependency_is_pinned() -> None:
    """What bootstrap.sh installs without a version is another one next month. ``gpu`` is for machines with one."""
    required = (ROOT / "setup.py").read_text(encoding="utf-8").split("install_requires=", 1)[1]
    names = re.findall(r'^ +"([\w.-]+)[^"]*",  # ', required, re.MULTILINE)
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert {"torch", "matplotlib", "wandb"} <= set(names)
    assert {name.lower() for name in names} - pinned == set()
