"""Libraries that stand for another system: they replace a few calls of libc in a process that is started with them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>

static int (*real_fcntl)(int, int, void *);

int flock(int file, int what) { errno = REASON; return -1; }

int fcntl64(int file, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (command == F_SETLK || command == F_SETLKW) { errno = REASON; return -1; }
    if (!real_fcntl) real_fcntl = dlsym(RTLD_NEXT, "fcntl64");
    return real_fcntl(file, command, argument);
}

int fcntl(int file, int command, ...) __attribute__((alias("fcntl64")));
"""
"""A file system without locks, which answers REASON."""


def without_locks(folder: Path, reason: str) -> dict[str, str]:
    """Environment of a process on a file system that answers a request for a lock with ``reason``, such as ENOSYS."""
    source, library = folder / f"no_locks_{reason}.c", folder / f"no_locks_{reason}.so"
    source.write_text(NO_LOCKS.replace("REASON", reason))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}
