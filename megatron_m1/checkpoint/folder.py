"""Checkpoint folders on disk: names, hashes, the commit by rename, the tracker, removal of old ones. No collectives.

``<run>/checkpoints/step_00000020/`` is complete by being there under this name: it is written as ``step_00000020.tmp``,
synced, and renamed. ``latest`` names the newest one. ``integrity.json``, sha256 of every file, is in megatron-core's
format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_m1.config import written
from megatron_m1.files import put_in_place, read_json_object, sync
from megatron_m1.printing import shown

TRACKER = "latest"
MANIFEST = "integrity.json"
STATE = "state.json"
CONFIG, RESOLVED = written.CONFIG, written.RESOLVED
TOKENIZER = "tokenizer"
"""Folder beside ``checkpoints`` with the tokenizer of a run, or of an imported model."""
TEMPORARY = ".tmp"
DAMAGED = ".damaged"
METADATA = ".metadata"
"""Where every tensor lies; a pickle."""
COMMIT_MARK = "metadata.json"
"""Written last by dist_checkpointing: without it the checkpoint is not complete."""
DATA_SUFFIX = ".distcp"
"""Of the files that hold tensors."""


def folder_name(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def run_folder_of(checkpoint: Path) -> Path:
    """Folder of the run to which a checkpoint belongs, as long as it lies there."""
    return checkpoint.resolve().parent.parent


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the checkpoints below ``root``, newest first; an empty list when ``root`` does not exist."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def tracked_step(root: Path) -> int | None:
    """Step that the tracker names; None without a (readable) tracker."""
    path = root / TRACKER
    if not path.is_file():
        return None
    match = re.fullmatch(r"step_(\d+)", path.read_text(errors="replace").strip())
    return int(match[1]) if match else None


def remove_temporary(root: Path) -> None:
    """Remove what interrupted saves and removals have left, and nothing else that is called so."""
    for path in root.glob(f"*{TEMPORARY}"):
        if path.name == TRACKER + TEMPORARY and not path.is_dir():
            path.unlink()
        elif re.fullmatch(rf"step_\d{{8,}}(\.old)?{re.escape(TEMPORARY)}", path.name) and path.is_dir():
            _clear(path)


def start(root: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint; return it."""
    temporary = root / (folder_name(step) + TEMPORARY)
    _clear(temporary)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, texts: dict[str, str], digests: dict[str, str]) -> Path:
    """Turn a temporary folder into a checkpoint; ``move_tracker`` makes it the one that is named newest.

    Args:
        temporary: from ``start``, with dist_checkpointing's files.
        texts: files to add, by name.
        digests: sha256 of data files that were hashed where they were written, by name; the rest is hashed here.

    Returns:
        The checkpoint's folder.
    """
    final = temporary.with_name(temporary.name.removesuffix(TEMPORARY))
    seal(temporary, texts, digests)
    old = final.with_name(f"{final.name}.old{TEMPORARY}")
    if os.path.lexists(final):
        _clear(old)
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    with suppress(OSError):
        _clear(old)
    return final


def seal(folder: Path, texts: dict[str, str], digests: dict[str, str]) -> None:
    """Add texts and the manifest to a checkpoint's data, and bring all to the disk; arguments as of ``commit``.

    May be called again after it was interrupted.
    """
    for name, text in texts.items():
        (folder / name).write_text(text)
    rest = [path.name for path in folder.iterdir() if path.name not in digests and path.name != MANIFEST]
    files = digests | file_digests(folder, rest)
    manifest = {"algorithm": "sha256", "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for name in (*rest, MANIFEST):
        sync(folder / name)
    sync(folder)


def move_tracker(checkpoint: Path) -> None:
    """Let ``latest`` name ``checkpoint``."""
    part = checkpoint.with_name(TRACKER + TEMPORARY)
    part.write_text(checkpoint.name + "\n")
    put_in_place(part, checkpoint.with_name(TRACKER))


def remove_old(root: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``; 0 keeps all."""
    for path in checkpoint_folders(root)[keep:] if keep else []:
        _remove(path)


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint to ``<name>.damaged``, so that it neither counts nor is tried again."""
    target = checkpoint.with_name(checkpoint.name + DAMAGED)
    _clear(target)
    checkpoint.rename(target)


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of files of ``folder``, by name."""
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def read_manifest(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint, by name, as it was saved.

    Raises:
        ValueError: the manifest is missing or torn, or leaves out a file that a reader believes; says which.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        files = {str(name): str(digest) for name, digest in json.loads(path.read_bytes())["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} can't be read") from error
    strange = next((name for name in files if Path(name).name != name or name == ".."), None)
    if strange is not None:
        raise ValueError(f"{MANIFEST} names {shown(strange)}, which is not in the checkpoint's folder")
    # Checkpoints of older versions have no RESOLVED.
    present = sorted(path.name for pattern in (f"*{DATA_SUFFIX}", RESOLVED) for path in checkpoint.glob(pattern))
    missing = next((name for name in (CONFIG, STATE, METADATA, COMMIT_MARK, *present) if name not in files), None)
    if missing is not None:
        raise ValueError(f"{MANIFEST} does not name {missing}")
    return files


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of its place in a run.

    Raises:
        ValueError: it can't be read, is no JSON object, or tells of another step; one line.
    """
    try:
        state = read_json_object(checkpoint / STATE)
    except OSError as error:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {STATE} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {error}") from error
    if state.get("step") != step_of(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is damaged: {STATE} is of step {shown(state.get('step'))}")
    return state


def first_fault(checkpoint: Path, expected: dict[str, str]) -> str | None:
    """Return what is wrong with the first bad one of the files in ``expected`` (sha256 by name), or None."""
    for name, digest in expected.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            if file_digests(checkpoint, [name])[name] != digest:
                return f"{name} is not what was saved"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


def _remove(folder: Path) -> None:
    # Under its own name a half-removed folder would count as a checkpoint.
    doomed = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    folder.rename(doomed)
    _clear(doomed)


def _clear(path: Path) -> None:
    """Remove what has a name, if anything has. Of a link only the link: what it leads to is somebody else's."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
