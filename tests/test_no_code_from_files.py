"""Our sources call nothing that runs code of a file, but for the one restricted reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("megatron_m1", "data", "parallel", "kernels", "benchmarks", "examples")
READER = ROOT / "megatron_m1" / "checkpoint" / "metadata_file.py"
POOL = ROOT / "megatron_m1" / "runtime" / "pool"
"""Processes of one program talk to each other through pipes of their own here; no file is read."""
FORBIDDEN = {
    "pickle": {"load", "loads", "Unpickler"},
    "torch": {"load"},
    "yaml": {"unsafe_load", "full_load", "unsafe_load_all", "full_load_all"},
    "": {"eval", "exec", "compile"},
    "marshal": {"load", "loads"},
    "joblib": {"load"},
}
"""Module -> its functions; of no module: builtins."""


def calls_that_run_code(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every use that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in FORBIDDEN.get(node.value.id, ()):
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN:
            for alias in node.names:
                if alias.name in FORBIDDEN[node.module]:
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if isinstance(node.func, ast.Name) and name in FORBIDDEN[""]:
                yield node.lineno, name
            if name == "load" and ast.unparse(node.func) == "yaml.load":
                loader = next((ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"), "")
                if loader not in ("yaml.SafeLoader", "_UniqueKeyLoader"):
                    yield node.lineno, "yaml.load"
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("trust_remote_code", "allow_pickle") and on:
                    yield node.lineno, str(keyword.arg)


def test_no_source_runs_what_a_file_says() -> None:
    found = []
    for path in (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))):
        for line, name in calls_that_run_code(path.read_text(encoding="utf-8")):
            is_pipe = path.parent == POOL and name == "pickle.loads"
            if (path, name) != (READER, "pickle.Unpickler") and not is_pipe:
                found.append(f"{path.relative_to(ROOT)}:{line} uses {name}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "np.load(path, allow_pickle=allowed)",
    ],
)
def test_such_a_use_is_seen(source: str) -> None:
    assert len(list(calls_that_run_code(source))) == 1


def test_harmless_uses_are_not() -> None:
    source = "yaml.load(text, Loader=_UniqueKeyLoader)\nnp.load(p, allow_pickle=False)\nmodel.eval()\nre.compile('a')"
    assert not list(calls_that_run_code(source))
