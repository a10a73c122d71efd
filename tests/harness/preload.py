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


BAD_SECTOR = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static ssize_t (*real_read)(int, void *, size_t);

ssize_t read(int file, void *buffer, size_t count) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    const char *bad = getenv("BAD_FILE");
    if (bad && length > 0) {
        path[length] = 0;
        off_t place = lseek(file, 0, SEEK_CUR);
        if (!strcmp(path, bad) && place <= BYTE && BYTE < place + (off_t)count) { errno = EIO; return -1; }
    }
    if (!real_read) real_read = dlsym(RTLD_NEXT, "read");
    return real_read(file, buffer, count);
}
"""
"""A disk that can't give one BYTE of the file that BAD_FILE names."""


def without_locks(folder: Path, reason: str) -> dict[str, str]:
    """Environment of a process on a file system that answers a request for a lock with ``reason``, such as ENOSYS."""
    return _preloaded(folder / f"no_locks_{reason}", NO_LOCKS.replace("REASON", reason))


def with_bad_sector(folder: Path, file: Path, byte: int) -> dict[str, str]:
    """Environment of a process that can't read the given byte of a file."""
    return _preloaded(folder / f"bad_sector_{byte}", BAD_SECTOR.replace("BYTE", str(byte))) | {"BAD_FILE": str(file)}


def _preloaded(path: Path, source: str) -> dict[str, str]:
    code, library = path.with_suffix(".c"), path.with_suffix(".so")
    code.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}
