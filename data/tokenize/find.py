"""Which files are documents, among those that were named and those in folders."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_m1.data.corpora.prefix import is_sidecar

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
_COMPRESSIONS = (".gz", ".zst")
_PARQUET = ".parquet"
_SUPPORTED = f"{', '.join(_JSON_SUFFIXES + _TEXT_SUFFIXES)} (plain, .gz or .zst) and {_PARQUET}"
_HOW = "--suffix .EXT takes such files as text"
_KINDS_SHOWN = 8
_HIDDEN = "hidden"
_MET_BEFORE = "met before"


@dataclass
class PassedOver:
    """What of one folder or glob is no input."""

    place: str
    """The folder or glob as it was named."""
    counts: Counter[str] = field(default_factory=Counter)
    """Entries by kind: a suffix, or what is the matter with them."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first path of each kind that is worth a name."""

    def add(self, kind: str, path: Path) -> None:
        """Count one entry."""
        self.counts[kind] += 1
        if kind != _HIDDEN and not kind.startswith("."):
            self.examples.setdefault(kind, str(path))

    def __str__(self) -> str:
        kinds = self.counts.most_common()
        # What is the matter comes in any case, suffixes only as far as there is room.
        shown = [kind for kind, _ in kinds if kind in self.examples or kind == _HIDDEN]
        shown += [kind for kind, _ in kinds if kind not in shown][:_KINDS_SHOWN]
        words = [self._words(kind) for kind, _ in kinds if kind in shown]
        rest = self.counts.total() - sum(self.counts[kind] for kind in shown)
        how = f" ({_HOW})" if any(kind.startswith(".") for kind in self.counts) else ""
        return f"passed over in {self.place}: {', '.join(words)}{f', {rest:,} of other kinds' if rest else ''}{how}"

    def _words(self, kind: str) -> str:
        example = self.examples.get(kind)
        more = ", ..." if self.counts[kind] > 1 else ""
        return f"{self.counts[kind]:,} {kind}" + (f" ({example}{more})" if example else "")


@dataclass(frozen=True)
class Found:
    """Input files, and what was passed over on the way."""

    files: list[Path]
    passed_over: list[PassedOver]
    """One for each input where something was."""


def text_suffix(text: str) -> str:
    """Return a suffix as it is compared with those of files: ``py`` and ``.PY`` are ``.py``.

    Raises:
        ValueError: it is none, or one whose files are read in another way.
    """
    suffix = f".{text.removeprefix('.').lower()}"
    if suffix == "." or not suffix[1:].isprintable() or set(suffix[1:]) & set("./* "):
        raise ValueError(f"{text!r} is no suffix of files: give one such as .py")
    if suffix in (*_JSON_SUFFIXES, *_COMPRESSIONS, _PARQUET):
        raise ValueError(f"{text!r} is not taken as text: {_SUPPORTED} are read as what they are")
    return suffix


def file_kind(file: Path, text_suffixes: Collection[str] = ()) -> Literal["json", "text", "parquet"] | None:
    """How the documents of a file are laid out, by its name; None if the name tells of none that we can read.

    Args:
        file: its path.
        text_suffixes: of files that are text besides the usual ones, from ``text_suffix``.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    last = suffixes[-2:-1] if suffixes and suffixes[-1] in _COMPRESSIONS else suffixes[-1:]
    if last and last[0] in _JSON_SUFFIXES:
        return "json"
    if last and (last[0] in _TEXT_SUFFIXES or last[0] in text_suffixes):
        return "text"
    return "parquet" if suffixes and suffixes[-1] == _PARQUET else None


def find_files(inputs: Sequence[str | Path], text_suffixes: Collection[str] = ()) -> list[Path]:
    """The files of :func:`find_inputs`, with its errors."""
    return find_inputs(inputs, text_suffixes).files


def find_inputs(inputs: Sequence[str | Path], text_suffixes: Collection[str] = ()) -> Found:
    """Resolve files, folders (searched recursively, through links as well) and globs to input files.

    Inputs keep their order; what a folder or glob holds is sorted by path; no file comes twice, whatever it is called.
    In folders, hidden entries, files of other kinds and whatever can't be read are passed over and counted; in folders
    and globs so are the sidecars of tokenised corpora.

    Args:
        inputs: paths and globs.
        text_suffixes: of files that are text besides the usual ones, from ``text_suffix``.

    Raises:
        FileNotFoundError: an input does not exist or a glob matches nothing.
        OSError: a folder that was named can't be read.
        ValueError: no input, a named file of an unknown kind, or a folder without any file of a known kind.
    """
    if not inputs:
        raise ValueError("no input was given; name a file, a folder or a glob")
    unique: dict[tuple[int, int], Path] = {}
    found: list[Path] = []
    passed_over: list[PassedOver] = []
    for item in inputs:
        passed = PassedOver(str(item))
        for file in _files_of(item, passed, text_suffixes):
            if file_kind(file, text_suffixes) is None:
                fix = f"; --suffix {file.suffix} takes it as text" if file.suffix else ""
                raise ValueError(f"{file} is of no supported kind; supported are {_SUPPORTED}{fix}")
            status = file.stat()
            first = unique.setdefault((status.st_dev, status.st_ino), file)
            if first is not file and _is_same(first, file, status):
                passed.add(_MET_BEFORE, file)
            else:
                found.append(file)
        if passed.counts:
            passed_over.append(passed)
    return Found(found, passed_over)


def _is_same(first: Path, second: Path, status: os.stat_result) -> bool:
    """Whether two names of one inode are of one file: some network file systems give a number out twice."""
    return status.st_nlink > 1 or os.path.realpath(first) == os.path.realpath(second)


def _files_of(item: str | Path, passed: PassedOver, text_suffixes: Collection[str]) -> list[Path]:
    """Files of one input in their order, no sidecars unless named."""
    path = Path(item)
    if path.is_dir():
        files = [file for file in _search(path, passed) if not _is_counted(file, passed, text_suffixes)]
        if not files:
            why = f"; {passed}" if passed.counts else ""
            raise ValueError(f"{path} holds no document files: supported are {_SUPPORTED}{why}")
        return files
    if path.exists():
        return [path]
    matches = sorted(map(Path, glob.glob(str(item), recursive=True)))
    if "**" not in str(item):
        for folder in filter(Path.is_dir, matches):
            passed.add("folder", folder)
    files = [match for match in matches if match.is_file() and not _is_counted_sidecar(match, passed)]
    if not files:
        why = f" ({passed})" if passed.counts else ""
        raise FileNotFoundError(f"{item} does not exist and matches nothing{why}; correct the path or the glob")
    return files


def _is_counted_sidecar(file: Path, passed: PassedOver) -> bool:
    if file.suffix != ".json" or not is_sidecar(file):
        return False
    passed.add("sidecar", file)
    return True


def _is_counted(file: Path, passed: PassedOver, text_suffixes: Collection[str]) -> bool:
    """Whether a file in a folder is no input; it is counted then."""
    if file_kind(file, text_suffixes) is None:
        passed.add(file.suffix.lower() or "without suffix", file)
        return True
    return _is_counted_sidecar(file, passed)


def _search(top: Path, passed: PassedOver) -> list[Path]:
    """All regular files below a folder that are not hidden, sorted."""
    files: list[Path] = []
    folders: list[Path] = [top]
    linked: list[Path] = []
    # By identity, so that a link to a folder above ends.
    seen: set[tuple[int, int]] = set()
    while folders or linked:
        # What has a place of its own is found there, not through a link.
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = folder.stat()
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError:
            if folder is top:
                raise
            passed.add("unreadable", folder)
            continue
        if (status.st_dev, status.st_ino) in seen:
            passed.add(_MET_BEFORE, folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in (folder / name for name in names):
            kind = _entry_kind(path)
            if kind == "folder":
                (linked if path.is_symlink() else folders).append(path)
            elif kind == "file":
                files.append(path)
            else:
                passed.add(kind, path)
    return sorted(files)


def _entry_kind(path: Path) -> str:
    """``folder``, ``file``, or what is the matter with an entry."""
    if path.name.startswith("."):
        return _HIDDEN
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "unreadable"
    except OSError:
        return "broken link" if path.is_symlink() else "unreadable"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "no regular file"


def check_unchanged(file: Path, before: os.stat_result, after: os.stat_result) -> None:
    """Raise ``ValueError`` if a regular file was written to between the two: half of a change may have been read."""
    if stat.S_ISREG(before.st_mode) and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{file} was changed while it was read; run again when nothing writes to it")


def damaged(file: Path, why: object) -> ValueError:
    """The error for a file that can't be read to its end."""
    return ValueError(f"{file} is truncated or damaged ({why}); fetch or compress it again")
