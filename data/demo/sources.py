"""Real text that every Python installation has: the standard library's code, its documentation, packages' documents."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",  # tables of characters
        "__pycache__",
    }
)
_PIECE_CHARACTERS = 450
"""A class or text that is longer is cut between its methods or paragraphs: a pack shall hold several documents."""
_PROSE_FILE = re.compile(
    r"(README|LICEN[CS]E|COPYING|NOTICE|CHANGE(S|LOG))[\w-]*(\.(md|rst|txt|apache|bsd|mit))?", re.IGNORECASE
)
_PROSE_FILE_BYTES = 300_000
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Module:
    """One module of the standard library."""

    docstring: str
    """Empty if it has none."""
    definitions: list[str]
    """Top-level functions and classes, headed by a comment that names module and class; long classes in pieces."""


def standard_library() -> Iterator[Module]:
    """Modules of the running Python, sorted by path; those that do not parse are left out.

    Raises:
        ValueError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root} holds no library sources; use a full Python (Debian: apt install python3)")
    for file in files:
        try:
            source = file.read_text("utf-8")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        yield Module(ast.get_docstring(tree) or "", list(_definitions(tree, source, name)))


def _definitions(tree: ast.Module, source: str, module: str) -> Iterator[str]:
    # Not str.splitlines: it also cuts at form feeds, where the parser counts no line.
    lines = source.split("\n")
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        head, stop = f"# {module}", node.end_lineno or node.lineno
        cuts = [_first_line(node)]
        if isinstance(node, ast.ClassDef):
            head = f"# {module}.{node.name}"
            members = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            cuts += [_first_line(member) for member in node.body if isinstance(member, members)]
        parts = ["\n".join(lines[a - 1 : b - 1]) for a, b in zip(cuts, [*cuts[1:], stop + 1], strict=True)]
        for piece in _grouped(parts, "\n"):
            yield f"{head}\n\n{piece.rstrip()}\n"


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _grouped(parts: list[str], separator: str) -> Iterator[str]:
    """Join neighbours up to the length of a piece."""
    group: list[str] = []
    size = 0
    for part in parts:
        if group and size + len(part) > _PIECE_CHARACTERS:
            yield separator.join(group)
            group, size = [], 0
        group.append(part)
        size += len(part)
    if group:
        yield separator.join(group)


def prose_texts() -> Iterator[str]:
    """Python's language reference by topic, then READMEs and licences of installed packages by package name.

    Module docstrings of :func:`standard_library` belong to the same source.
    """
    yield from _topics()
    # Not all of sys.path: importing torch adds setuptools' private copies of packages to it.
    folders = sorted({sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")})
    packages = {package.metadata["Name"] or "": package for package in importlib.metadata.distributions(path=folders)}
    for name in sorted(packages):
        yield str(packages[name].metadata.json.get("description", ""))
        for file in sorted(packages[name].files or []):
            if not _PROSE_FILE.fullmatch(file.name):
                continue
            path = Path(str(file.locate()))
            try:
                if path.stat().st_size <= _PROSE_FILE_BYTES:
                    yield path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # listed but removed since, or no text


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        return  # some distributions leave it out; packages' documents remain
    for name in sorted(topics):
        yield topics[name]


def sections(text: str) -> Iterator[list[str]]:
    """Cut a text into sections of whole paragraphs, each a list of paragraphs."""
    paragraphs = [paragraph.strip("\n").rstrip() for paragraph in _BLANK_LINES.split(text) if paragraph.strip()]
    group: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if group and size + len(paragraph) > _PIECE_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(paragraph)
        size += len(paragraph)
    if group:
        yield group
