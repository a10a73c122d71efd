"""The commands of README.md, so that a walk runs what a reader is told to run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def section_of(title: str) -> str:
    """The text below the heading ``title``, with the sub-headings that follow it, to the next one of its level.

    ``KeyError`` if there is no such heading.
    """
    lines = README.read_text().splitlines()
    found = [
        (len(match[1]), at)
        for at, line in enumerate(lines)
        if (match := re.fullmatch(rf"(#+) {re.escape(title)}", line))
    ]
    if not found:
        raise KeyError(f"README.md has no section {title!r}")
    level, start = found[0]
    fenced = False
    for at in range(start + 1, len(lines)):
        fenced ^= lines[at].startswith("```")
        heading = re.match(r"(#+) ", lines[at])
        if heading and not fenced and len(heading[1]) <= level:
            return "\n".join(lines[start + 1 : at])
    return "\n".join(lines[start + 1 :])


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a language in a section, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section_of(section), re.MULTILINE | re.DOTALL)


def commands(section: str) -> list[list[str]]:
    """The words of every command in a section's bash blocks: no comments, continued lines joined, quotes taken off.

    Variables are not expanded, and ``A=1 command`` keeps its assignment as a word.
    """
    lines = "\n".join(blocks(section, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
