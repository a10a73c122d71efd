"""How one packed sequence is cut over ranks: built once per micro-batch, asked by every layer."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The documents of one packed sequence, and which of its tokens this rank holds.

    The rank's tokens are its segments, one after the other; "local" counts within them. Make one with ``build``.
    """

    document_bounds: tuple[int, ...]
    """[N + 1] bounds of the pack's documents in global tokens: 0, then each document's end."""
    segments: tuple[tuple[int, int], ...]
    """The ranges [start, end) of global tokens that this rank holds, in the order in which it holds them."""
    context_parallel_size: int
    context_parallel_rank: int
    device: torch.device
    """Where ``positions`` and ``local_cu_seqlens`` are."""

    @classmethod
    def build(
        cls, cu_seqlens: Tensor | Sequence[int], *, context_parallel_size: int = 1, context_parallel_rank: int = 0
    ) -> SequenceLayout:
        """Lay out the pack whose documents end to end have the bounds ``cu_seqlens``.

        Args:
            cu_seqlens: [N + 1] ints, a sequence or an integer tensor on the CPU: 0, then each document's end in tokens,
                strictly rising; the last is the length of the pack, which no padding follows.
            context_parallel_size: ranks that share the pack; 1 for now.
            context_parallel_rank: this rank among them, from 0.

        Raises:
            ValueError: bounds or ranks that are not as above.
        """
        bounds = _read_bounds(cu_seqlens)
        if context_parallel_size < 1:
            raise ValueError(f"context_parallel_size is {context_parallel_size}: give 1")
        if context_parallel_size > 1:
            raise ValueError(f"context_parallel_size is {context_parallel_size}: not supported yet, give 1")
        if not 0 <= context_parallel_rank < context_parallel_size:
            raise ValueError(f"context_parallel_rank is {context_parallel_rank} of {context_parallel_size}: give 0")
        return cls(bounds, ((0, bounds[-1]),), context_parallel_size, context_parallel_rank, torch.device("cpu"))

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on ``device``; itself if they are there already."""
        device = torch.device(device)
        return self if device == self.device else dataclasses.replace(self, device=device)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole pack, over all ranks."""
        return self.document_bounds[-1]

    @property
    def local_tokens(self) -> int:
        """Tokens that this rank holds."""
        return sum(end - start for start, end in self.segments)

    @property
    def num_documents(self) -> int:
        """Documents of the whole pack."""
        return len(self.document_bounds) - 1

    @property
    def max_document_length(self) -> int:
        """Tokens of the pack's longest document."""
        return max(end - start for start, end in itertools.pairwise(self.document_bounds))

    @cached_property
    def local_document_bounds(self) -> tuple[int, ...]:
        """``local_cu_seqlens`` as plain ints, which no one waits for a device to read."""
        bounds, offset = [0], 0
        for start, end in self.segments:
            inner = (bound for bound in self.document_bounds if start < bound < end)
            bounds += [offset + bound - start for bound in (*inner, end)]
            offset += end - start
        return tuple(bounds)

    @cached_property
    def local_cu_seqlens(self) -> Tensor:
        """[N + 1] int32 on ``device``: bounds, in local tokens, of the N documents (or parts of one) in this rank."""
        return torch.tensor(self.local_document_bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[local_tokens] int64 on ``device``: each local token's position within its document, from 0."""
        bounds = torch.tensor(self.document_bounds)
        starts = torch.repeat_interleave(bounds[:-1], bounds.diff())  # [total_tokens]
        positions = torch.arange(self.total_tokens) - starts
        return torch.cat([positions[start:end] for start, end in self.segments]).to(self.device)


def _read_bounds(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            shape = list(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} of shape {shape}: give int32 or int64 [N + 1]")
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: give it on the CPU, where it is read")
        cu_seqlens = cu_seqlens.tolist()
    try:
        bounds = tuple(operator.index(bound) for bound in cu_seqlens)
    except TypeError as error:
        raise ValueError(f"cu_seqlens holds something other than ints ({error}): give token counts") from error
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens begins {list(bounds[:2])}: give 0, then the end of each of 1 or more documents")
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end <= start:
            raise ValueError(f"cu_seqlens puts document {document} at [{start}, {end}): bounds must rise strictly")
    return bounds
