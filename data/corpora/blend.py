"""Blends of tokenised corpora: weights, and what stands in one twice.

Two datasets of one content have the same order, so that every pack would come twice; none is told by its name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_m1.data.corpora.prefix import INDEX_HEADER_BYTES, PrefixSummary, bin_path, check_prefix, idx_path

_SAMPLES, _SAMPLE_NUMBERS, _END_NUMBERS = 16, 1 << 11, 1 << 15


def parse_blend(blend: Sequence[str]) -> tuple[list[str], list[float]]:
    """Split a blend into prefixes and weights that sum to 1.

    A corpus that stands there more than once, by whatever path or link, comes once, in its first place and with the sum
    of its weights: two datasets of one corpus have the same order, so that every pack would come twice.

    Args:
        blend: prefixes, each preceded by its weight (``["0.7", "code", "0.3", "prose"]``), or all without; then
            every corpus has the weight of its number of tokens, which reads their indices.

    Raises:
        ValueError: empty, weights on some prefixes only, a weight or sum of weights that is not above 0 and finite.
        FileNotFoundError: without weights, a file is missing.
    """
    prefixes, weights = _split_blend(blend)
    summed: dict[str, float] = {}
    for first, weight in zip(_first_spellings(prefixes), weights, strict=True):
        summed[first] = summed.get(first, 0.0) + weight
    total = sum(summed.values())
    shares = [weight / total for weight in summed.values()]
    if not all(share > 0.0 for share in shares):
        raise ValueError(f"blend {list(blend)} has weights too large or too far apart to have shares; scale them down")
    return list(summed), shares


def repeated_corpora(blend: Sequence[str]) -> list[tuple[str, str]]:
    """Corpora that stand in a blend again: (this spelling, that of the first). Errors as of ``parse_blend``."""
    prefixes, _ = _split_blend(blend)
    seen: set[str] = set()
    repeated = []
    for prefix, first in zip(prefixes, _first_spellings(prefixes), strict=True):
        if first in seen:
            repeated.append((prefix, first))
        seen.add(first)
    return repeated


def shared_corpora(blend: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    """Corpora of ``blend`` with the one of ``other`` that has the same tokens. All must be there."""
    candidates = parse_blend(other)[0]
    same = {_identity(candidate): candidate for candidate in candidates}
    pairs = []
    for prefix in parse_blend(blend)[0]:
        found = same.get(_identity(prefix))
        if found is not None:
            pairs.append((prefix, found))
        else:
            pairs += [(prefix, pair.first) for pair in _copies([*candidates, prefix]) if pair.again == prefix]
    return pairs


def _split_blend(blend: Sequence[str]) -> tuple[list[str], list[float]]:
    items = [str(item) for item in blend]
    numbers = [_number(item) for item in items]
    if not items:
        raise ValueError("the blend is empty; give at least one tokenised prefix")
    if all(number is None for number in numbers):
        return items, [float(check_prefix(prefix).tokens) for prefix in items]
    weights = [number for number in numbers[::2] if number is not None]
    if 2 * len(weights) != len(items) or any(number is not None for number in numbers[1::2]):
        raise ValueError(f"blend {items} mixes prefixes with and without weight; write weight prefix weight prefix")
    if not all(0.0 < weight < float("inf") for weight in weights):
        raise ValueError(f"blend {items} has a weight that is not above 0 and finite; drop that prefix instead")
    return items[1::2], weights


def _number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def _first_spellings(prefixes: Sequence[str]) -> list[str]:
    """Every prefix as the first one that names the same file spells it."""
    spellings: dict[tuple[int, ...] | str, str] = {}
    return [spellings.setdefault(_identity(prefix), prefix) for prefix in prefixes]


def _identity(prefix: str) -> tuple[int, ...] | str:
    """What is the same for all paths and links to one .bin and one .idx."""
    try:
        found = [path.stat() for path in (bin_path(prefix), idx_path(prefix))]
    except OSError:
        # Whoever opens it says so.
        return os.path.realpath(prefix)
    # Size and time as well: some network file systems give an inode's number out twice.
    return tuple(
        number for status in found for number in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    )


@dataclass(frozen=True)
class _Again:
    """A corpus with the tokens of an earlier one."""

    first: str
    again: str
    is_copy: bool
    """Its documents are the same too."""


def _copies(prefixes: Sequence[str]) -> list[_Again]:
    """Corpora of one content, whatever dtype holds their ids. Only those with as many tokens as another are read."""
    summaries = [check_prefix(prefix) for prefix in prefixes]
    often = Counter(summary.tokens for summary in summaries)
    first: dict[str, tuple[str, str]] = {}
    found = []
    for summary in summaries:
        if often[summary.tokens] > 1:
            ids = _sampled(bin_path(summary.prefix), summary.dtype, 0, summary.tokens)
            lengths = _sampled(idx_path(summary.prefix), np.int32, INDEX_HEADER_BYTES, summary.documents)
            if ids in first:
                before, its_lengths = first[ids]
                found.append(_Again(before, summary.prefix, lengths == its_lengths))
            first.setdefault(ids, (summary.prefix, lengths))
    return found


def _sampled(path: Path, dtype: type[np.integer[Any]], start: int, count: int) -> str:
    """Hash of how many numbers follow byte ``start``, and of those at both ends and in blocks between, as int64."""
    state = hashlib.sha256(count.to_bytes(8, "little"))
    size = np.dtype(dtype).itemsize
    blocks = [(count * sample // _SAMPLES, _SAMPLE_NUMBERS) for sample in range(_SAMPLES)]
    with path.open("rb", buffering=0) as stream:
        for first, length in [(0, _END_NUMBERS), (max(0, count - _END_NUMBERS), _END_NUMBERS), *blocks]:
            stream.seek(start + first * size)
            content = stream.read(min(length, count - first) * size)
            state.update(np.frombuffer(content, dtype).astype(np.int64).tobytes())
    return state.hexdigest()


def check_blend(blend: Sequence[str], *, tokenizer_digest: str | None = None) -> list[PrefixSummary]:
    """``prefix.check_prefix`` on every corpus of a blend, with the errors of :func:`parse_blend`.

    Raises:
        ValueError: besides, two corpora have the same tokens, in the same documents or in others.
    """
    prefixes, _ = parse_blend(blend)
    summaries = [check_prefix(prefix, tokenizer_digest=tokenizer_digest) for prefix in prefixes]
    for pair in _copies(prefixes):
        what = (
            "are copies of one corpus, whose packs would come twice in the same order"
            if pair.is_copy
            else "have the same tokens, which their indices cut into other documents"
        )
        raise ValueError(f"{pair.first} and {pair.again} {what}; name one of them, with the sum of their weights")
    return summaries
