"""How one packed sequence is cut over ranks: built once per micro-batch, asked by every layer."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_m1.parallel.balance import ModelCost, choose_segments
from megatron_m1.parallel.crossings import Crossings, RankSegments
from megatron_m1.parallel.ring_plan import RingPlan, plan_ring
from megatron_m1.parallel.state_plan import StatePlan, plan_states


@dataclass(frozen=True)
class SequenceLayout:
    """The documents of one packed sequence, and which of its tokens this rank holds.

    The rank's tokens are its segments, one after the other; "local" counts within them. Make one with ``build``.
    Softmax and lightning layers use the same one: neither moves an activation to another rank.
    """

    document_bounds: tuple[int, ...]
    """[N + 1] bounds of the pack's documents in global tokens: 0, then each document's end."""
    segment_bounds: tuple[int, ...]
    """[S + 1] bounds of the segments of all ranks in global tokens."""
    owners: tuple[int, ...]
    """[S] the rank that holds each segment."""
    context_parallel_rank: int
    device: torch.device
    """Where ``positions`` and ``local_cu_seqlens`` are."""

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        *,
        context_parallel_size: int = 1,
        context_parallel_rank: int = 0,
        cost: ModelCost | None = None,
    ) -> SequenceLayout:
        """Lay out the pack whose documents end to end have the bounds ``cu_seqlens``.

        Args:
            cu_seqlens: [N + 1] ints, a sequence or an integer tensor on the CPU: 0, then each document's end in tokens,
                strictly rising; the last is the length of the pack, which no padding follows.
            context_parallel_size: ranks that share the pack; divides its length and leaves each at least 2 tokens.
            context_parallel_rank: this rank among them, from 0.
            cost: what the model spends on tokens, pairs and states, by which segments are dealt; the same on every
                rank. Default: two segments a rank in zigzag order, whatever the documents are.

        Raises:
            ValueError: bounds or ranks that are not as above.
        """
        bounds = _read_bounds(cu_seqlens)
        size, rank = context_parallel_size, context_parallel_rank
        for name, value in (("context_parallel_size", size), ("context_parallel_rank", rank)):
            if not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}: give an int")
        if size < 1:
            raise ValueError(f"context_parallel_size is {size}: give 1 or more")
        if not 0 <= rank < size:
            raise ValueError(f"context_parallel_rank is {rank} of {size}: give 0 to {size - 1}")
        if bounds[-1] % size:
            padded = -(-bounds[-1] // size) * size
            raise ValueError(
                f"the pack has {bounds[-1]} tokens, not a multiple of context_parallel_size {size}: pad its end to "
                f"{padded}"
            )
        if size > 1 and bounds[-1] < 2 * size:
            raise ValueError(
                f"context_parallel_size is {size}, but a pack of {bounds[-1]} tokens has 2 segments for at most "
                f"{bounds[-1] // 2} ranks: lower it"
            )
        segments = choose_segments(bounds, size, cost)
        return cls(bounds, segments.bounds, segments.owners, rank, torch.device("cpu"))

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on ``device``; itself if they are there already."""
        device = torch.device(device)
        return self if device == self.device else dataclasses.replace(self, device=device)

    @property
    def context_parallel_size(self) -> int:
        """Ranks that share the pack."""
        return max(self.owners) + 1

    @property
    def segments_per_rank(self) -> int:
        """Segments of every rank."""
        return len(self.owners) // self.context_parallel_size

    @cached_property
    def local_segments(self) -> tuple[int, ...]:
        """Indices of this rank's segments, rising."""
        return tuple(s for s, owner in enumerate(self.owners) if owner == self.context_parallel_rank)

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The ranges [start, end) of global tokens that this rank holds, in the order in which it holds them."""
        return tuple((self.segment_bounds[s], self.segment_bounds[s + 1]) for s in self.local_segments)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole pack, over all ranks."""
        return self.document_bounds[-1]

    @cached_property
    def local_tokens(self) -> int:
        """Tokens that this rank holds, as many as any other."""
        return sum(end - start for start, end in self.segments)

    @property
    def max_document_length(self) -> int:
        """Tokens of the pack's longest document."""
        return max(end - start for start, end in itertools.pairwise(self.document_bounds))

    @cached_property
    def crossings(self) -> Crossings:
        """Where documents go on from one segment to the next."""
        return Crossings.of(self.document_bounds, self.segment_bounds)

    @cached_property
    def state_plan(self) -> StatePlan:
        """What this rank's lightning layers exchange."""
        return plan_states(self.crossings, self.owners, self.context_parallel_rank)

    @cached_property
    def ring_plan(self) -> RingPlan:
        """What this rank's softmax layers exchange."""
        return plan_ring(self.crossings, self.owners, self.context_parallel_rank)

    @cached_property
    def local_document_bounds(self) -> tuple[int, ...]:
        """``local_cu_seqlens`` as plain ints, which no one waits for a device to read."""
        return RankSegments(self.crossings, self.local_segments).document_bounds(joined=False)

    @cached_property
    def local_cu_seqlens(self) -> Tensor:
        """[N + 1] int32 on ``device``: bounds, in local tokens, of the documents' N pieces in this rank's segments."""
        return torch.tensor(self.local_document_bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[local_tokens] int64 on ``device``: each local token's position within its document, from 0."""
        documents = np.asarray(self.document_bounds)
        tokens = np.concatenate([np.arange(start, end) for start, end in self.segments])
        starts = documents[np.searchsorted(documents, tokens, side="right") - 1]
        return torch.from_numpy(tokens - starts).to(self.device)

    def take_local(self, x: Tensor) -> Tensor:
        """This rank's tokens of ``x`` [total_tokens, ...], in the order in which the rank holds them."""
        if len(self.segments) == 1:
            start, end = self.segments[0]
            return x[start:end]
        return torch.cat([x[start:end] for start, end in self.segments])  # [local_tokens, ...]


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
