"""Paths as users write them: in YAML and after ``=``, no shell expands ``~``, ``~user``, ``$NAME`` and ``${NAME}``."""

from __future__ import annotations

import argparse
import os
import string
from pathlib import Path

HUGGING_FACE = "hf:"
"""Prefix of ``run.init_from`` that names a Hugging Face folder."""


def expand(text: str) -> str:
    """Return the path that ``text`` means; ``$$`` is a dollar sign, and what follows ``hf:`` is a path.

    Raises:
        ValueError: a variable is not set or empty, a user does not exist, or a ``$`` belongs to no name. One line.
    """
    if text.startswith(HUGGING_FACE):
        return HUGGING_FACE + expand(text.removeprefix(HUGGING_FACE))
    head, slash, rest = text.partition("/")
    home, below = "", text
    if head.startswith("~"):
        home = os.path.expanduser(head)
        if home.startswith("~"):
            raise ValueError(f"{text!r}: there is no user {head[1:]}; for a file of that name write ./{head}")
        home, below = home + slash, rest
    try:
        # An empty one would move what stands behind it to the root of the file system.
        return home + string.Template(below).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise ValueError(f"{text!r}: the environment variable {error.args[0]} is not set, or empty") from error
    except ValueError as error:
        raise ValueError(f"{text!r}: a $ stands before no name of a variable; write $$ for a dollar sign") from error


def path_option(text: str) -> Path:
    """Read a path on the command line; argparse puts the option's name before the error."""
    return Path(text_option(text))


def text_option(text: str) -> str:
    """Read a path on the command line whose spelling is kept: a glob, or the start of file names."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def input_option(text: str) -> str:
    """Read an input on the command line: the shell may have made it of a glob, and a $ is a part of its name."""
    return text if "$" in text and os.path.lexists(text) else text_option(text)
