"""The scan of an affine state update over the segments of a pack, written once for both directions.

A segment takes the state that enters it to ``T(state) + local``: ``T`` is its transition, ``local`` the state that its
own tokens leave. For lightning attention ``T`` is a decay per head; for a gated delta rule it is a matrix per head,
which travels with ``local``. The backward pass is the same scan from the last segment to the first, with ``T``
transposed and the gradients that each segment's queries leave in the place of ``local``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Link:
    """One segment's part of a chain."""

    source: int
    """Row of the segment's ``local`` among those of all ranks."""
    tokens: int
    """Tokens of the segment."""
    output: int = -1
    """Row of the result to which the state after this segment goes; -1 if nobody asks for it."""


type Chain = Sequence[Link]
"""The segments that one document's state passes through, in that order; it is zero before the first."""


class Transition(Protocol):
    """What a whole segment does to the state that enters it."""

    def carry(self, state: Tensor, link: Link) -> Tensor:
        """``T(state)`` of the segment ``link``, in a tensor of its own; shape and dtype of ``state`` [H, Dk, Dv]."""
        ...


@dataclass(frozen=True)
class Decay:
    """The transition of lightning attention: ``exp(-slope x tokens)`` per head, its own transpose."""

    slopes: Tensor
    """[H], natural-log decay per token."""

    def carry(self, state: Tensor, link: Link) -> Tensor:
        """Decay ``state`` over the segment's tokens."""
        return state * torch.exp(-self.slopes.to(state.dtype) * link.tokens)[:, None, None]


def scan(chains: Sequence[Chain], local: Tensor, transition: Transition, outputs: int) -> Tensor:
    """Walk every chain and return the states that its links ask for.

    Args:
        chains: one per document.
        local: [R, H, Dk, Dv], the segments' own states, those of all ranks.
        transition: what a segment does to the state that enters it.
        outputs: rows of the result, each asked for by exactly one link.

    Returns:
        [outputs, H, Dk, Dv] in ``local``'s dtype.
    """
    result = local.new_empty((outputs, *local.shape[1:]))
    for chain in chains:
        state: Tensor | None = None
        for link in chain:
            state = local[link.source] if state is None else transition.carry(state, link).add_(local[link.source])
            if link.output >= 0:
                result[link.output] = state
    return result
