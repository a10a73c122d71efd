"""The run folder is one run's: one writer at a time, and nobody's files are written over.

``run.lock`` is locked by the operating system for rank 0 (``fcntl``, which NFS and Lustre pass on to other nodes), so
that a killed run frees it. Not every file system passes it on, or has locks at all. So the file also says who holds it,
and its time moves on every few seconds: a holder on another machine is given up only when its time stands still.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.checkpoint.folder import TOKENIZER, run_folder_of
from megatron_m1.config import Config
from megatron_m1.config.fields import STAGES
from megatron_m1.config.io import load_config
from megatron_m1.config.portable import HERE
from megatron_m1.config.written import CONFIG, RESOLVED, STARTS, read_saved, yaml_text
from megatron_m1.config.yaml_text import parse_yaml
from megatron_m1.files import WITHOUT_LOCKS, is_file_at, refuse_overwriting, regular, warn_without_locks
from megatron_m1.training.run_tokenizer import own_copy

LOCK = "run.lock"
METRICS, SUMMARY = "metrics.jsonl", "summary.json"
IMPORTED = "initial"
"""Folder in which a Hugging Face folder that a run starts from lies as a checkpoint."""
WRITTEN = (CONFIG, RESOLVED, METRICS, STARTS, SUMMARY, "wandb_id")
"""Files of a run folder that a run writes over."""
BEAT_SECONDS = 5.0
"""Between two signs of life of the holder."""
SILENCE_SECONDS = 30.0
"""Without a sign of life, as long as an attribute is cached on NFS, a holder on another machine is dead."""
PATIENCE_SECONDS = 5.0
"""That a killed process has to end: its lock goes with the last of it."""
_GROUPS = ["preset", "model", "parallel", "data", "optimizer", "train", "run"]


def check_run_folder(config: Config) -> None:
    """Check that a run in ``run.folder`` would replace nothing but files of a run, and nothing that it reads.

    Raises:
        ValueError: it would; names the file.
    """
    folder = Path(config.run.folder)
    blend = [*config.data.train, *config.data.validation]
    read = [Path(f"{prefix}{suffix}") for prefix in blend for suffix in (".bin", ".idx", ".json")]
    tokenizer = Path(config.data.tokenizer)
    read += [tokenizer] if config.data.tokenizer and tokenizer.is_file() else []
    moved_aside = [] if own_copy(tokenizer, folder) == tokenizer else [folder / TOKENIZER]
    refuse_overwriting([*(folder / name for name in (*WRITTEN, LOCK)), *moved_aside], read)
    strange = _strange_file(folder, tokenizer)
    if strange is not None:
        raise ValueError(
            f"run.folder = {folder} has a {strange} that no run has written: move it, or choose another folder"
        )


def _strange_file(folder: Path, tokenizer: Path) -> str | None:
    """Name of what a run would replace in its folder and has not written."""
    configs = [name for name in (CONFIG, RESOLVED) if os.path.lexists(folder / name)]
    for name in configs:
        if not is_written_by_a_run(folder / name):
            return name
    is_new = not configs and not complete_checkpoints(folder)
    if is_new:
        names = [*WRITTEN, *([] if own_copy(tokenizer, folder) == tokenizer else [TOKENIZER])]
        return next((name for name in names if os.path.lexists(folder / name)), None)
    # A pipe or a folder of that name.
    for name in (*WRITTEN, LOCK, TOKENIZER):
        path = folder / name
        if path.exists() and not (path.is_dir() if name == TOKENIZER else path.is_file()):
            return name
    return None


def is_written_by_a_run(path: Path) -> bool:
    """Whether a config.yaml is as ``write_config`` writes it, of whatever version: people write comments, and less."""
    try:
        text = regular(path).read_text(encoding="utf-8")
        content = parse_yaml(text)
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict) or list(content) not in (_GROUPS, [*_GROUPS, STAGES]):
        return False
    return yaml_text(content) == text


def own_configuration(folder: Path) -> Config | None:
    """What a run asked for that can go on in ``folder``, with paths that can be opened from here; None without one.

    Raises:
        ValueError: its ``config.yaml`` is of another version, say.
    """
    if not complete_checkpoints(folder) or not is_written_by_a_run(folder / CONFIG):
        return None
    config = read_saved(folder, folder).asked
    # Asked of the start in an empty folder.
    config.run.resume = True
    return config


def saved_configuration(file: Path) -> Config | None:
    """What a file of a run or of a checkpoint says, with paths that can be opened from here; None if it is none.

    It has every field, and its paths are of the run's folder and not of the directory of a call.

    Raises:
        ValueError: it, or the one beside it, can't be read.
    """
    place = file.parent
    if file.name not in (CONFIG, RESOLVED) or not all((place / name).is_file() for name in (CONFIG, RESOLVED)):
        return None
    if load_config(place / CONFIG).run.folder != HERE:
        return None
    is_checkpoint = re.fullmatch(r"step_\d+", place.resolve().name) is not None
    saved = read_saved(place, run_folder_of(place) if is_checkpoint else place)
    return saved.asked if file.name == CONFIG else saved.became


@contextmanager
def sole_writer(
    folder: Path,
    note: Callable[[str], None],
    *,
    beat_seconds: float = BEAT_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> Iterator[None]:
    """Hold the run folder, made if missing, for the length of the block; in the process that writes to it.

    Args:
        folder: ``run.folder``.
        note: called with one line before a wait.
        beat_seconds: between two signs of life.
        silence_seconds: after which a holder on another machine counts as dead: several of its beats.

    Raises:
        OSError: the folder or its lock can't be made.
        ValueError: another process holds it; names host and process. Or ``run.lock`` is somebody's file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor, mine = _acquire(path, note, silence_seconds)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(descriptor, beat_seconds, over), name="run lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        # Somebody may have removed it, and another run made a new one.
        with suppress(OSError, ValueError):
            if is_file_at(descriptor, path) and _holder(descriptor, path) in (mine, None):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, note: Callable[[str], None], silence_seconds: float) -> tuple[int, dict[str, str]]:
    """Open, lock and sign ``run.lock``; the open file and the signature."""
    while True:
        descriptor, is_locked = _take(path)
        try:
            holder = _holder(descriptor, path)
            # On this machine the lock itself has told.
            if holder is not None and not (is_locked and holder["machine"] == _machine()):
                note(
                    f"{path} was left by process {holder['process']} on host {holder['host']}: looking for "
                    f"{silence_seconds:.0f} s whether it still runs"
                )
                _wait_for_silence(descriptor, path, silence_seconds)
            mine = _sign(descriptor, path, is_locked=is_locked)
        except BaseException:
            os.close(descriptor)
            raise
        if is_file_at(descriptor, path):
            return descriptor, mine
        # The former holder has ended just now.
        os.close(descriptor)


def _take(path: Path) -> tuple[int, bool]:
    """Open and lock ``run.lock``; whether the file system has locks."""
    # Not flock, which a forked child would hold on to. The price: closing any descriptor of the file gives the lock up,
    # so that this process must not open it again.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = _open(path)
        is_locked = True
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _holder_or_refuse(descriptor, path)
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise _refusal(path, holder) from error
                time.sleep(0.1)
                continue
            if error.errno not in WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            is_locked = False
            warn_without_locks(path.absolute().parent)
        # The former holder may have removed its file meanwhile.
        if is_file_at(descriptor, path):
            return descriptor, is_locked
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise _strange(path) from error
        raise


def _strange(path: Path) -> ValueError:
    return ValueError(f"{path} is there, and no lock of megatron-m1: move it, or choose another run.folder")


def _holder(descriptor: int, path: Path) -> dict[str, str] | None:
    """Who has signed the lock; None for nobody.

    Raises:
        ValueError: what stands there is no signature.
    """
    content = os.pread(descriptor, 4096, 0)
    if not content.strip():
        return None
    try:
        holder = json.loads(content)
        known = {name: str(holder[name]) for name in ("run_lock", "machine", "host", "process", "since")}
    except (ValueError, LookupError, TypeError):
        raise _strange(path) from None
    return known


def _holder_or_refuse(descriptor: int, path: Path) -> dict[str, str] | None:
    try:
        return _holder(descriptor, path)
    except ValueError:
        os.close(descriptor)
        raise


def _refusal(path: Path, holder: dict[str, str] | None) -> ValueError:
    who = "another process"
    if holder is not None:
        who = f"process {holder['process']} on host {holder['host']} since {holder['since']}"
    return ValueError(f"{path.parent} is being trained by {who}: wait for it or end it, or choose another run.folder")


def _machine() -> str:
    """What tells this machine from others, also where all are called localhost; another one after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _wait_for_silence(descriptor: int, path: Path, seconds: float) -> None:
    seen = os.stat(path).st_mtime_ns
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if not is_file_at(descriptor, path):
            return
        if os.stat(path).st_mtime_ns != seen:
            raise _refusal(path, _holder(descriptor, path))


def _sign(descriptor: int, path: Path, *, is_locked: bool) -> dict[str, str]:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    mine = {
        "run_lock": uuid.uuid4().hex,
        "machine": _machine(),
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "since": since,
    }
    # On a full disk the lock holds all the same, and only its message is poorer.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
        os.fsync(descriptor)
    if not is_locked:
        # Of two that start at once, the one that has signed last has it.
        time.sleep(1.0)
        holder = _holder(descriptor, path)
        if holder != mine:
            raise _refusal(path, holder)
    return mine


def _beat(descriptor: int, seconds: float, over: threading.Event) -> None:
    while not over.wait(seconds):
        with suppress(OSError):
            os.utime(descriptor)
