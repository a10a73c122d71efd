"""Sizes that a pickle names, compared with its own length: C's unpickler makes room for them before it reads on."""

from __future__ import annotations

import pickletools
import re

_GLOBAL, _FRAME, _LONG_BINPUT, _STOP = b"c", b"\x95", b"r", b"."
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""Bytes of the length that stands before an argument."""
_CODES = {code.code.encode("latin-1"): code.arg.n if code.arg is not None else 0 for code in pickletools.opcodes}
_PREFIXES = {code: _WIDTHS[size] for code, size in _CODES.items() if size in _WIDTHS} | {_FRAME: 8, _LONG_BINPUT: 4}


def _plain_codes() -> re.Pattern[bytes]:
    """Match any number of opcodes whose arguments are of a constant size: nearly all of a pickle, in one step of C."""
    sizes: dict[int, bytes] = {}
    for code, size in _CODES.items():
        if size >= 0 and code not in _PREFIXES and code != _STOP:
            sizes[size] = sizes.get(size, b"") + re.escape(code)
    kinds = [b"[%b].{%d}" % (codes, size) for size, codes in sorted(sizes.items())]
    # An integer of up to 8 bytes is as good as constant, and each tensor beyond 2 GiB has one.
    kinds += [b"\x8a\\x%02x.{%d}" % (size, size) for size in range(9)]
    kinds.append(re.escape(_GLOBAL) + rb"[^\n]*+\n[^\n]*+\n")
    return re.compile(b"(?:%b)*+" % b"|".join(kinds), re.DOTALL)


_PLAIN = _plain_codes()


def check_sizes(content: bytes) -> None:
    """Check that a pickle asks for no more room than it brings data for. Reads nothing after its end.

    Text opcodes other than that of a class, which no pickle of protocol 2 or later has, are not known.

    Raises:
        ValueError: it does, is cut off, or has an unknown opcode.
    """
    at = 0
    while True:
        match = _PLAIN.match(content, at)
        assert match is not None
        at = match.end()
        code = content[at : at + 1]
        if code == _STOP:
            return
        if code not in _PREFIXES:
            raise ValueError(f"byte {at} begins no opcode")
        end = at + 1 + _PREFIXES[code]
        size = int.from_bytes(content[at + 1 : end], "little")
        # Whatever has been numbered before took two bytes, its own opcode and the one that numbered it.
        if size > (at // 2 if code == _LONG_BINPUT else len(content) - end):
            raise ValueError(f"byte {at} asks for room for {size}")
        at = end if code in (_FRAME, _LONG_BINPUT) else end + size
