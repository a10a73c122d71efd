"""A pickle that asks for more room than it brings is refused before it is read; every honest one passes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from megatron_m1.checkpoint.pickle_sizes import check_sizes

VALUES: list[Any] = [
    [1, 1 << 40, -1, 1 << 80, -(1 << 62), 2.5, None, True],
    ["", "é" * 300, b"x" * 70_000, b"", "y" * 70_000],
    {"a": (1, 2, 3, 4), "b": {1, 2}, "c": bytearray(b"abc"), "d": pickle.Pickler},
    [str(number) for number in range(1000)] * 2,  # numbered beyond one byte
]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=["numbers", "texts", "kinds", "many"])
def test_honest_pickles_pass_and_torn_ones_do_not(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    check_sizes(content)
    check_sizes(content + b"\xff what follows is not read")
    for end in range(0, len(content), max(1, len(content) // 97)):
        with pytest.raises(ValueError, match="byte "):
            check_sizes(content[:end])


def little(number: int, width: int) -> bytes:
    return number.to_bytes(width, "little")


@pytest.mark.parametrize(
    "operation",
    [
        b"Nr" + little(3, 4),
        b"Nr" + little((1 << 32) - 1, 4),
        b"N" * 100 + b"r" + little(53, 4),
        b"\x95" + little(1 << 62, 8),
        b"\x96" + little(1 << 40, 8),
        b"\x8e" + little(1 << 40, 8),
        b"\x8d" + little(1 << 40, 8),
        b"B" + little(1 << 31, 4),
        b"T" + little((1 << 32) - 1, 4),
        b"X" + little(1 << 31, 4),
        b"\x8b" + little((1 << 32) - 1, 4),
        b"\x8a\xff1",
        b"C\xff1",
        b"Np99999999999\n",
    ],
)
def test_room_for_what_is_not_there(operation: bytes) -> None:
    with pytest.raises(ValueError, match=r"asks for room for|begins no opcode"):
        check_sizes(b"\x80\x04" + operation + b"N" * 40 + b".")
