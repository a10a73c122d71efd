"""A real pseudo-terminal with a screen of its own: what a user sees of a command, and how the cursor is left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|[\r\n\b\x07]")


class Screen:
    """Lines as a terminal shows them. Knows what our output uses: movement, erasing, a cursor; colours are ignored."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[str] = [""]
        self.wrapped: set[int] = set()
        """Numbers of the lines that a line too long for the terminal went on in."""
        self.cursor_is_shown = True
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        """Draw ``text``, whose control sequences are whole."""
        place = 0
        for control in CONTROL.finditer(text):
            self._write(text[place : control.start()])
            self._obey(control)
            place = control.end()
        self._write(text[place:])

    def _write(self, text: str) -> None:
        for character in text:
            if self._column == self.columns:
                self._down()
                self._column = 0
                self.wrapped.add(self._row)
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    def _obey(self, control: re.Match[str]) -> None:
        number, kind = control[1] or "", control[2] or control[0]
        if kind == "\r":
            self._column = 0
        elif kind == "\n":
            self._down()
        elif kind == "A":
            self._row = max(0, self._row - int(number or 1))
        elif kind == "K":
            self.lines[self._row] = "" if number == "2" else self.lines[self._row][: self._column]
            self.wrapped.discard(self._row)
        elif kind == "J":
            self.lines[self._row] = self.lines[self._row][: self._column]
            del self.lines[self._row + 1 :]
        elif kind in "hl" and number == "?25":
            self.cursor_is_shown = kind == "h"
        else:
            assert kind in "m\x07\b" or control[0].startswith("\x1b]"), f"the screen does not know {control[0]!r}"


class Terminal:
    """A command in a terminal of its own, which is its controlling one: Ctrl-C reaches whoever is in the foreground.

    Args:
        command: program and arguments.
        columns: width.
        environ: of the command.
        cwd: folder in which it starts, None for this process's.
    """

    def __init__(
        self, command: Sequence[str], *, columns: int, environ: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.columns = columns
        self._end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        unsized = {k: v for k, v in environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            list(command),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cwd,
            env=unsized,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self._output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._end, 65536)
            except OSError:  # nobody has the other end any more
                return
            self._output += part

    def raw(self) -> str:
        """All that was written so far."""
        return self._output.decode(errors="replace")

    def screen(self) -> Screen:
        """What the terminal shows now."""
        screen = Screen(self.columns)
        text = self.raw()
        # A control sequence may have come in part.
        screen.feed(re.sub(r"\x1b(\[[?\d;]*)?$", "", text))
        return screen

    def press_ctrl_c(self) -> None:
        """Send the key."""
        os.write(self._end, b"\x03")

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 240.0) -> None:
        """Wait until ``condition`` holds while the command runs.

        Raises:
            AssertionError: it has ended, or ``seconds`` have passed.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.raw()
            assert time.monotonic() < deadline, self.raw()
            time.sleep(0.005)

    def ends(self, *, seconds: float = 240.0) -> int:
        """Wait for the command and for what it has written; its status."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(60)
        os.close(self._end)
