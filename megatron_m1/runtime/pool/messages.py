"""What the calling process and its workers say to each other, pickled by module name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RELEASE = b"release"
"""The calling process lets a worker leave the process group of the call that it answered."""


@dataclass(frozen=True)
class Call:
    """One function on ``world_size`` ranks."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    world_size: int
    store_port: int
    """Port on this machine of the TCPStore that the calling process serves for this call alone."""
    timeout: float
    """Seconds after which the calling process gives the call up."""
    process_group: bool
    """Whether the worker initialises (and destroys) the default gloo group around the function."""


@dataclass(frozen=True)
class Answer:
    """What one rank gives back: a pickled value, or a pickled exception with its traceback."""

    value: bytes | None = None
    error: bytes | None = None
    traceback: str = ""
    threads: int = 0
    """Threads of the worker once the function had returned."""


def pickled_exception(error: BaseException) -> bytes:
    """Pickle ``error``; one that can't travel becomes a RuntimeError with its type and message, and a note why."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception as reason:
        # Of any type: pickling runs the exception class's own code, here and on arrival.
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(f"told as text, since it can't be pickled: {type(reason).__name__}: {reason}")
        return pickle.dumps(told)
    return data
