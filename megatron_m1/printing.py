"""Printing never ends a run: standard output and error that outlive their terminal, pipe, file or file system.

Whoever reads may go away (``| tee`` at a Ctrl-C, ``| head``, a closed terminal), a log's disk may be full, a job may
be started with closed streams. What can't be printed then is dropped, and the next line is tried again.
"""

from __future__ import annotations

import io
import os
import reprlib
import sys
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
