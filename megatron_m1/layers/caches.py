"""What sequences carry from pass to pass: a state per lightning layer, keys and values per softmax layer.

States have one size whatever the length of a sequence; keys and values grow by a token a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_m1.kernels.lightning import lightning_attention, lightning_attention_step

LEAST_ROOM = 64
"""Tokens for which a sequence's keys and values get memory at first; it doubles when it is full."""


class _Growing:
    """Rows that are appended to, in memory that doubles."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._length = 0

    def append(self, rows: Tensor) -> Tensor:
        """Add rows [n, ...]; return all of them, [length, ...]."""
        end = self._length + rows.shape[0]
        if self._memory is None or end > self._memory.shape[0]:
            room = max(LEAST_ROOM, 2 * self._length, end)
            grown = rows.new_empty((room, *rows.shape[1:]))
            if self._memory is not None:
                grown[: self._length] = self._memory[: self._length]
            self._memory = grown
        self._memory[self._length : end] = rows
        self._length = end
        return self._memory[:end]


class Caches:
    """The caches of several sequences. A forward pass packs the next tokens of some of them, each as a document.

    Args:
        sequences: how many there are.
    """

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        """Tokens that each sequence has so far."""
        self._states: dict[int, Tensor] = {}
        self._keys: dict[tuple[int, int], _Growing] = {}
        self._values: dict[tuple[int, int], _Growing] = {}
        self._active: list[int] = []

    def begin(self, active: Sequence[int]) -> None:
        """Say which sequences the next pass's documents belong to, in order."""
        self._active = list(active)

    def end(self, cu_seqlens: Sequence[int]) -> None:
        """Count the tokens of the pass that is over; ``cu_seqlens`` are its documents' bounds."""
        for sequence, (start, stop) in zip(self._active, pairwise(cu_seqlens), strict=True):
            self.lengths[sequence] += stop - start

    def positions(self, within: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Positions in the sequences, [n], from those within the pass's documents, [n]."""
        before = torch.tensor([self.lengths[sequence] for sequence in self._active])
        return within + before.repeat_interleave(torch.tensor(cu_seqlens).diff()).to(within.device)

    def lightning(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        cu_seqlens: Sequence[int],
        backend: str | None,
    ) -> Tensor:
        """Lightning attention that goes on from each sequence's state, and keeps the new ones.

        Args:
            layer: which layer.
            q, k, v: [n, heads, dim], the documents of the pass.
            slopes: [heads].
            cu_seqlens: their bounds.
            backend: see ``kernels.lightning``.

        Returns:
            [n, heads, dim] in ``v``'s dtype.
        """
        if layer not in self._states:
            shape = (len(self.lengths), q.shape[1], q.shape[2], v.shape[2])
            self._states[layer] = torch.zeros(shape, dtype=torch.float32, device=q.device)
        states = self._states[layer]
        before = states[self._active]  # [documents, heads, dim, dim]
        if q.shape[0] == len(self._active):
            output, after = lightning_attention_step(q, k, v, slopes, before, backend=backend)
        else:
            output, after = lightning_attention(
                q,
                k,
                v,
                slopes,
                cu_seqlens=cu_seqlens,
                initial_state=before,
                output_final_state=True,
                backend=backend,
            )
        states[self._active] = after
        return output

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Causal softmax attention of each document to its whole sequence so far.

        Args:
            layer: which layer.
            q: [n, heads, dim], rotated.
            k, v: [n, groups, dim], keys rotated; they are kept.
            cu_seqlens: the documents' bounds.

        Returns:
            [n, heads, dim] in ``q``'s dtype.
        """
        outputs = []
        for sequence, (start, stop) in zip(self._active, pairwise(cu_seqlens), strict=True):
            place = (layer, sequence)
            keys = self._keys.setdefault(place, _Growing()).append(k[start:stop])  # [all, groups, dim]
            values = self._values.setdefault(place, _Growing()).append(v[start:stop])
            new, every = stop - start, keys.shape[0]
            mask = None
            if new > 1:
                # Row t of the new ones sees everything before them, and the new ones up to itself.
                mask = torch.ones(new, every, dtype=torch.bool, device=q.device).tril_(every - new)
            # [m, heads, dim] -> [1, heads, m, dim]
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q[start:stop], keys, values))
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def nbytes(self) -> tuple[int, int]:
        """Memory of the lightning states, and of the keys and values."""
        states = sum(state.nbytes for state in self._states.values())
        rows = [
            store._memory.nbytes
            for store in (*self._keys.values(), *self._values.values())
            if store._memory is not None
        ]
        return states, sum(rows)
