"""Silence what megatron-core and torch say of absent software when they are imported and built."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("megatron", "torch.utils.cpp_extension")
_LOCK = threading.RLock()
"""Settings are the process's: of two threads, the second would take the first one's silence for the program's own."""


def silence_libraries() -> None:
    """Silence them for good, as a command does: what they say of their own workings would bury its lines.

    The loggers of megatron-core warn that GPTModel will have a successor and that DDP lays out its own buffers; its
    warnings and torch's extension loader name optional software. None of that is news that a user could act on.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the program's own settings: what it hears afterwards is what it heard before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with _LOCK, warnings.catch_warnings():
        levels = [logger.level for logger in loggers]
        silence_libraries()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
