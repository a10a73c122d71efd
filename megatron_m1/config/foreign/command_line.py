"""A command line of Megatron-LM as it is copied from a script: launcher, shell variables and quotes included."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from megatron_m1.config.foreign.meaning import normal_name

_ARRAY = re.compile(r"\$\{?\w+\[[@*]\]\}?")
_LARGEST = 10**15
"""Beyond any number of layers, samples or iterations."""


@dataclass(frozen=True)
class Given:
    """A flag and what followed it."""

    spelled: str
    """With its dashes, as it was written."""
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The flag as it stood there, in one line."""
        return " ".join(" ".join((self.spelled, *self.values)).split())

    @property
    def has_variable(self) -> bool:
        """Whether a value is the shell's to fill in."""
        return any("$" in value for value in self.values)

    def number(self) -> Decimal:
        """Return its one value as a number.

        Raises:
            ValueError: it has none, or that is no finite number of a possible size.
        """
        try:
            number = Decimal(self.values[0]) if len(self.values) == 1 else Decimal("nan")
        except InvalidOperation:
            number = Decimal("nan")
        if not number.is_finite() or abs(number) > _LARGEST:
            raise ValueError(f"{self.text}: give it one number")
        return number

    def whole_number(self, at_least: int = 0) -> int:
        """Return its one value as an integer of at least ``at_least``.

        Raises:
            ValueError: it is none.
        """
        number = self.number()
        if number != number.to_integral_value() or number < at_least:
            raise ValueError(f"{self.text}: give it an integer of at least {at_least}")
        return int(number)


@dataclass(frozen=True)
class CommandLine:
    """What a command line says."""

    flags: Mapping[str, Given]
    """By name without dashes, words joined by dashes; of one that comes twice the last, as argparse has it."""
    strays: tuple[str, ...]
    """Words that belong to no flag, such as ``${MODEL_ARGS[@]}``."""

    def known(self, name: str) -> Given | None:
        """Return a flag unless it is missing or has a value that only the shell knows."""
        given = self.flags.get(name)
        return None if given is None or given.has_variable else given


def read_command_line(words: Sequence[str]) -> CommandLine:
    """Read words of a command line, the whole of it in one word or cut by a shell.

    What stands before the script (``torchrun ... pretrain_gpt.py``) or module (``-m package``) is skipped.

    Raises:
        ValueError: a quote is not closed; one line.
    """
    rest = _after_launcher([piece for word in words for piece in _pieces(word, alone=len(words) == 1)])
    flags: dict[str, Given] = {}
    strays: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            strays += [word] if word not in ("\\", "--") else []
            continue
        spelled, equals, value = word.partition("=")
        values = [value] if equals else []
        while rest and not equals and not rest[0].startswith("--") and not _ARRAY.fullmatch(rest[0]):
            values.append(rest.pop(0))
        name = normal_name(spelled)
        flags.pop(name, None)
        flags[name] = Given(spelled, tuple(value for value in values if value != "\\"))
    return CommandLine(flags, tuple(strays))


def _pieces(word: str, *, alone: bool) -> list[str]:
    """Cut a word that is a whole command, or a flag with its value, which scripts keep together in arrays."""
    if not any(map(str.isspace, word)) or not (alone or word.startswith("--")):
        return [word]
    try:
        pieces = shlex.split(word, comments=True)
    except ValueError as error:
        raise ValueError(f"{' '.join(word.split())[:80]}: {str(error).lower()}") from error
    return [part for piece in pieces for part in (_pieces(piece, alone=False) if alone else [piece])]


def _after_launcher(words: list[str]) -> list[str]:
    script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None:
        return words[script + 1 :]
    module = next((at for at, word in enumerate(words) if word == "-m"), None)
    return words if module is None else words[module + 2 :]
