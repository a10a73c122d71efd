"""Files that several processes share: locks, writes that are whole or absent, and what must not be written over."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK_MARK = b"A lock of megatron-m1. Remove it if no process of megatron-m1 is at work here.\n"
"""Content of a lock file, which tells it from somebody's file of the same name."""
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What a file system says that offers no locks, such as Lustre mounted without ``-o flock``."""

NO_FILE = "no regular file"
"""What is said of a pipe, a device or a socket among the files of a folder."""

_log = logging.getLogger(__name__)


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock between processes for the length of the ``with`` block.

    The lock file exists only while someone holds it or waits for it; a process that dies releases its lock. On a file
    system without locks the block runs all the same, after one warning that names the folder.

    Args:
        path: lock file, made if missing; its folder must exist.
        wait: wait for another holder to finish; False raises instead.

    Raises:
        BlockingIOError: ``wait`` is False and another process holds the lock.
        ValueError: what has the lock's name is no lock of ours.
    """
    while True:
        descriptor, is_ours = _open_lock(path)
        try:
            _lock(descriptor, path, wait=wait)
        except BaseException:
            os.close(descriptor)
            raise
        # The former holder removed its file while we waited: what we hold then locks nobody out.
        if is_file_at(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        # Nor is it removed when it is an empty file that was there before: anybody may have made that.
        if is_ours and is_file_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def _open_lock(path: Path) -> tuple[int, bool]:
    """Open a lock file; whether it is ours to remove. Never through a link, which may lead to somebody's file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        pass
    else:
        # By the mark, later starts know our locks. A full disk takes no mark: an empty file counts as well.
        with suppress(OSError):
            os.pwrite(descriptor, LOCK_MARK, 0)
        return descriptor, True
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        content = os.pread(descriptor, len(LOCK_MARK) + 1, 0)
    except FileNotFoundError:
        return _open_lock(path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise ValueError(f"{path} is there, and no lock of megatron-m1: move it, or choose another name") from error
        raise
    if content not in (b"", LOCK_MARK):
        os.close(descriptor)
        raise ValueError(f"{path} is there, and no lock of megatron-m1: move it, or choose another name")
    return descriptor, content == LOCK_MARK


def _lock(descriptor: int, path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        warn_without_locks(path.absolute().parent)


@functools.cache
def warn_without_locks(folder: Path) -> None:
    """Say in one line on stderr, once a process, that nothing keeps a second process out of ``folder``."""
    _log.warning("megatron-m1: warning: %s has no file locks: let no second process write there meanwhile", folder)


def is_file_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: it may have been removed, or another put in its place."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that nothing is written over or removed while it is read, by whatever name or link.

    Files that exist are compared by identity, so that hard links, symbolic links and file systems that ignore case are
    seen through. An output that does not exist yet can't be an input.

    Args:
        outputs: files that will be written, and folders that will be emptied.
        inputs: files that are read.

    Raises:
        ValueError: an output is an input, or a folder that an input lies in.
    """
    places = {}
    for output in outputs:
        with suppress(FileNotFoundError, NotADirectoryError):
            places[_identity(output)] = output
    if not places:
        return
    seen: set[Path] = set()
    for path in inputs:
        # As it is named and as it is: a link in a folder is lost with the folder.
        for candidate in {path, *path.absolute().parents, *path.resolve().parents} - seen:
            seen.add(candidate)
            with suppress(FileNotFoundError, NotADirectoryError):
                place = places.get(_identity(candidate))
                if place is not None:
                    raise ValueError(f"{place} would be written over, but {path} is read: choose another output")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def partial_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name: hidden, beside it, and nobody else's."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file that is written its name, over an older one: bytes first, so that no crash leaves a torn one."""
    sync(partial)
    partial.replace(path)
    sync(path.absolute().parent)


def regular(path: Path) -> Path:
    """Return a path that is about to be read, if it is a regular file or a link to one.

    Every file of a folder that comes from elsewhere goes through here or ``check_folder``: opening a named pipe waits
    for a writer that never comes, and a device may have no end.

    Raises:
        OSError: it is something else, or can't be looked at; says so in ``strerror``.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NO_FILE, str(path))
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a regular file that holds one JSON object.

    Raises:
        OSError: it can't be read.
        ValueError: it holds something else; one line.
    """
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def check_folder(folder: Path) -> None:
    """Check that a folder from elsewhere holds nothing but files and folders: libraries open what they find there.

    Raises:
        ValueError: a pipe, a device or a socket lies there, or in a folder directly below.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        # What can't be looked at can't be opened either.
        with suppress(OSError):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ValueError(f"{path} can't be read: {NO_FILE}: remove it from the folder")


def check_writable(what: str, folder: Path) -> None:
    """Check that files can be made in a folder, which is left as it is; one that is not there yet could be made.

    Args:
        what: begins the message: what shall be written there.

    Raises:
        ValueError: no file can be made in it, or in the nearest folder above it that is there.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        # Permission bits don't tell: root ignores them, and a file system may be read-only or full.
        with tempfile.TemporaryDirectory(prefix=".megatron-m1-", dir=existing) as probe:
            Path(probe, "probe").write_bytes(b"probe")
    except OSError as error:
        # Some file systems on which nothing can be made, such as /proc, answer that the folder itself is not there.
        reason = "no file can be made in it" if error.errno == errno.ENOENT else error.strerror
        raise ValueError(f"{what} can't be written: {existing}: {reason}; choose another folder") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a kill leaves the old file or the new one, never a part."""
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(error: BaseException, folder: Path) -> str:
    """What the operating system said when a write to ``folder`` failed, in a line, also where a library hides it.

    torch's writer, in C++, meets a full disk as an offset that it did not expect.
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno is not None:
            return f"{os.strerror(link.errno)} ({link.filename2 or link.filename or folder})"
    try:
        if os.statvfs(folder).f_bavail == 0:
            return f"{os.strerror(errno.ENOSPC)} ({folder})"
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as found:
        return f"{found.strerror} ({folder})"
    return f"{next(iter(str(error).splitlines()), type(error).__name__)} ({folder})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
