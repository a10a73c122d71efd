"""The command line of a sub-command: argparse, whose errors are one line with the nearest option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron_m1.config.fields import nearest
from megatron_m1.config.numbers import whole_number


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises ``ValueError`` with one line instead of printing its usage and leaving."""

    def __init__(self, command: str, description: str, usage: str) -> None:
        super().__init__(
            prog=f"megatron-m1 {command}",
            description=description,
            usage=f"megatron-m1 {command} {usage}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the message of argparse as ``ValueError``."""
        raise ValueError(f"{message}; {self.prog} --help lists the options")

    def option_names(self) -> list[str]:
        """Return the long options without ``--``."""
        return [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse ``arguments``; nothing may be left over.

        Raises:
            ValueError: an option is unknown (with the nearest one) or has a bad value.
        """
        parsed, rest = self.parse_known_args(arguments)
        for word in rest:
            if word.startswith("--"):
                name = word.removeprefix("--").partition("=")[0]
                close = nearest(name, self.option_names())
                fix = f"did you mean --{close}?" if close else f"{self.prog} --help lists the options"
                raise ValueError(f"unknown option --{name}: {fix}")
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command's own words from the dotted flags of the configuration, which take a value."""
    own: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            own.append(word)
            continue
        flags.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return own, flags


def positive_integer(text: str) -> int:
    """Read an integer above 0, also one written 1e3 or 4_096; argparse puts the option's name before the error."""
    return _above_zero(text, counts=False)


def token_count(text: str) -> int:
    """Read a number of tokens above 0, which may be written 2K or 1.5M; argparse puts the option's name before it."""
    return _above_zero(text, counts=True)


def _above_zero(text: str, *, counts: bool) -> int:
    try:
        number = whole_number("the value", text, counts=counts)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(number, int) or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return number
