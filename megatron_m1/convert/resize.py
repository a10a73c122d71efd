"""More rows in the embedding and the head of a Hugging Face folder, for a tokenizer that has grown.

Old rows stay bit for bit. New ones are made as the tensor is read, one tensor at a time, and come out the same
whichever rank makes them and however often: a conversion that was killed goes on, and ``--verify`` has what to compare.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_m1.convert.families.minimax_m1.config import has_native_heads
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece, units
from megatron_m1.convert.hub_folder import HubFolder

ResizeInit = Literal["mean", "normal", "zeros"]
INITS: tuple[ResizeInit, ...] = get_args(ResizeInit)
SUGGESTED_MULTIPLE = 128
"""Megatron-LM's default of ``--make-vocab-size-divisible-by``."""
_MOST_ROWS = 1 << 24
"""More are a slip of the hand: no tokenizer has a tenth of that."""
_PIECE_ROWS = 4096
"""Rows that are summed at a time, so that no copy in fp64 has the size of the tensor."""


@dataclass(frozen=True)
class Resize:
    """How many rows, and what is in the new ones."""

    rows: int
    """Wanted at least."""
    multiple: int = 1
    """``rows`` is rounded up to a multiple of it."""
    init: ResizeInit = "mean"
    """mean: all new rows are the mean of the old ones. normal: drawn around it, in each column with the standard
    deviation of the old rows. zeros. Means and deviations are taken in fp64, and what is made of them is rounded to the
    dtype in which the folder has the tensor."""

    def rows_for(self, old: int) -> int:
        """Rows of the result, from the folder's ``old``.

        Raises:
            ValueError: they are fewer than there are, or too many; one line.
        """
        rows = math.ceil(self.rows / self.multiple) * self.multiple
        if rows < old:
            raise ValueError(
                f"--resize-vocab {self.rows} would drop rows: the model has {old:,}; give at least that many, or leave "
                "it out"
            )
        if rows > _MOST_ROWS:
            raise ValueError(f"--resize-vocab {rows:,} rows: no more than {_MOST_ROWS:,} are made")
        return rows


def resize_notes(resize: Resize, old: int) -> list[str]:
    """What a user should know of the new rows, one line each."""
    rows = resize.rows_for(old)
    if rows == old:
        return [f"the model has {old:,} rows already: nothing is resized"]
    made = {
        "mean": "each the mean of the old ones",
        "normal": "drawn with mean and deviation of the old ones",
        "zeros": "of zeros",
    }
    notes = [f"embedding and head have {rows:,} rows, {rows - old:,} of them new, {made[resize.init]}"]
    if rows % SUGGESTED_MULTIPLE:
        rounded = math.ceil(rows / SUGGESTED_MULTIPLE) * SUGGESTED_MULTIPLE
        notes.append(
            f"{rows:,} rows are no multiple of {SUGGESTED_MULTIPLE}: a tensor-parallel size must divide them, and "
            f"tensor cores want multiples of 8 at least; --resize-multiple {SUGGESTED_MULTIPLE} makes them {rounded:,}"
        )
    return notes


@dataclass
class ResizedFolder(HubFolder):
    """A folder that is read as if its embedding and head had more rows. Make one with ``resized``."""

    init: ResizeInit = "mean"
    stored_rows: int = 0
    """Rows that the folder itself has."""

    def read(self, unit: WeightPiece) -> Tensor:
        """As of ``HubFolder``; a new row's dtype is that of the old ones."""
        stored = self.entries[unit.parts[0].name].shape
        if len(unit.parts) > 1 or stored == unit.parts[0].shape:
            return super().read(unit)
        part = replace(unit.parts[0], shape=stored)
        old = super().read(replace(unit, shape=stored, parts=(part,)))
        # [old rows, hidden] -> [rows, hidden]
        whole = old.new_empty(unit.shape)
        whole[: len(old)] = old
        _fill(whole[len(old) :], old, self.init, name=unit.ours)
        return whole


def resized(source: HubFolder, resize: Resize) -> HubFolder:
    """``source`` with more rows; ``source`` itself where it has as many.

    Args:
        source: opened with its headers.
        resize: how.

    Raises:
        ValueError: as of ``Resize.rows_for``.
    """
    rows = resize.rows_for(source.model.vocab_size)
    if rows == source.model.vocab_size:
        return source
    model = replace(source.model, vocab_size=rows)
    return ResizedFolder(
        source.folder,
        source.config,
        model,
        units(model, native_heads=has_native_heads(source.config)),
        source.files,
        source.entries,
        source.announced,
        init=resize.init,
        stored_rows=source.model.vocab_size,
    )


def _fill(new: Tensor, old: Tensor, init: ResizeInit, *, name: str) -> None:
    """Put numbers into ``new`` [rows, hidden], a view, from ``old`` [old rows, hidden]; ``name`` seeds the draws."""
    if init == "zeros":
        new.zero_()
        return
    mean = _column_means(old, lambda piece: piece)
    if init == "mean":
        new.copy_(mean)
        return
    deviation = _column_means(old, lambda piece: (piece - mean).square()).sqrt()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1)
    for rows in new.split(_PIECE_ROWS):
        rows.copy_(mean + deviation * torch.randn(rows.shape, generator=generator, dtype=torch.float64))


def _column_means(old: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """fp64 [hidden]: the mean over all rows of what ``of`` makes of them."""
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for piece in old.split(_PIECE_ROWS):
        total += of(piece.double()).sum(0)
    return total / len(old)
