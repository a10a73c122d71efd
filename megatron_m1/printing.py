"""Printing never ends a run: standard output and error that outlive their terminal, pipe, file or file system.

And it fits: tables and lines by a terminal's width, and a last word of a process that is about to be gone.

Whoever reads may go away (``| tee`` at a Ctrl-C, ``| head``, a closed terminal), a log's disk may be full, a job may
be started with closed streams. What can't be printed then is dropped, and the next line is tried again.
"""

from __future__ import annotations

import io
import os
import reprlib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


LONGEST_MESSAGE = 2000
"""Characters of a message: a file from elsewhere may have a name or a value of megabytes."""


class _Short(reprlib.Repr):
    """Of a list that is its own grandchild many times over, as YAML's aliases make it, no more than a part is spelt."""

    def __init__(self) -> None:
        super().__init__(maxlevel=2, maxlist=8, maxdict=8, maxstring=120, maxother=120)

    def repr_int(self, x: int, level: int) -> str:
        # Python does not spell numbers of more than 4,300 digits.
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length():,} bits"


shown = _Short().repr
"""Spell a value that a file from elsewhere has, as ``repr`` does, but not at any length."""


def cut(text: str) -> str:
    """One line of at most ``LONGEST_MESSAGE`` characters, with the beginning and the end of a longer one."""
    text = " ".join(text.split())
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Spell a number of things: ``1 step``, ``2,048 processes`` (the plural is the noun with an s unless given)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def terminal_columns() -> int | None:
    """Return the width of the terminal that standard output is, None if it is none: then lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(line: str, columns: int | None, *, indent: int = 0) -> list[str]:
    """Break a line between words, so that no terminal breaks it in the middle of a number; a longer word stays whole.

    Args:
        line: of any length.
        columns: of the terminal; None breaks nothing.
        indent: columns of space before what goes on.
    """
    if columns is None or len(line) <= columns:
        return [line]
    wrapper = textwrap.TextWrapper(
        columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(line)


def table(rows: Sequence[Sequence[str]], columns: int | None, *, left: Sequence[int] = ()) -> list[str]:
    """Lay out cells under each other. Where they don't fit, each row goes on in further lines, by whole cells.

    Args:
        rows: the cells, as many in every row; the first row is the heading.
        columns: of the terminal; None fits everything.
        left: indices of the columns of words, which are flush left; numbers are flush right.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    # What goes on stands to the right of the first cell, which names the row.
    indent = widths[0] + 2
    parts: list[list[int]] = [[]]
    room = columns
    for index, width in enumerate(widths):
        if room is not None and columns is not None and width > room and parts[-1]:
            parts.append([])
            room = columns - indent
        parts[-1].append(index)
        room = None if room is None else room - width - 2
    lines = []
    for row in rows:
        for number, part in enumerate(parts):
            cells = [row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in part]
            lines.append((" " * indent * bool(number) + "  ".join(cells)).rstrip())
    return lines


def say_at_once(line: str) -> None:
    """Write ``line`` to standard error past all buffers and locks, for a process that leaves without cleaning up.

    On a terminal the line takes the place of a live one that nobody will remove, and the cursor is shown.
    """
    clean = "\r\x1b[J\x1b[?25h" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{clean}{line}\n".encode(errors="backslashreplace"))


class _Output(io.FileIO):
    """Standard output or error. While it is ``lasting``, every write succeeds as far as the caller can tell."""

    def __init__(self, descriptor: int, *, lasting: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lasting = lasting

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
            if written is None:
                raise BlockingIOError(None, "its reader is too slow for a pipe that does not block")
            return written
        except OSError as error:
            if self.lasting:
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise
            raise ValueError(f"standard output can't be written: {error.strerror or error}") from error


def _guarded(stream: TextIO | None, descriptor: int, *, lasting: bool) -> TextIO:
    """Return a stream like ``stream`` that writes through ``_Output``; ``stream`` itself if it is not the process's."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or _output_of(stream) is not None:
        return stream
    try:
        if stream.fileno() != descriptor:
            return stream
        stream.flush()
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, lasting=lasting)),
        encoding=stream.encoding,
        # A character that the terminal's encoding lacks is no reason to end either.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _output_of(stream: TextIO) -> _Output | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None


def _open_missing() -> None:
    """Open what of standard input, output and error is closed, on the null device.

    The next file that a process opens takes the number of a closed one, and gets what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)


def guard_streams() -> None:
    """Let nothing that is printed to ``sys.stderr`` from now on raise, and prepare ``sys.stdout`` for ``keep_output``.

    Until then a command that only prints ends when nobody reads (BrokenPipeError), and fails when what it prints can't
    be written (ValueError, one line). To be called first of all: what logs keeps the stream that it finds.
    """
    _open_missing()
    sys.stderr = _guarded(sys.stderr, 2, lasting=True)
    sys.stdout = _guarded(sys.stdout, 1, lasting=False)


def keep_output() -> None:
    """Let nothing that is printed to ``sys.stdout`` from now on raise: the command's work is not what it prints."""
    output = _output_of(sys.stdout)
    if output is not None:
        output.lasting = True
        # What could not be written before is dropped here, and not at exit, with a status of its own.
        with suppress(OSError):
            sys.stdout.flush()
