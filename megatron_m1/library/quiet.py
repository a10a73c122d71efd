"""Silence for a while what megatron-core and torch say of absent software when they are imported and built."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("megatron", "torch.utils.cpp_extension")
_LOCK = threading.RLock()
"""Settings are the process's: of two threads, the second would take the first one's silence for the program's own."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the program's own settings: what it hears afterwards is what it heard before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with _LOCK, warnings.catch_warnings():
        levels = [logger.level for logger in loggers]
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
