"""Softmax attention: megatron-core's, around a core with rotary positions and causality inside each document (GQA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.kind import LayerKind, Matrix
from megatron_m1.layers.pack import batch_params, layout_of
from megatron_m1.parallel.block_attention import document_groups, document_mask
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.shapes.residual import inner_gain, output_gain
from megatron_m1.shapes.softmax import rotary_dim

LEAST_ROOM = 64
"""Tokens for which a sequence's keys and values get memory at first; it doubles when it is full."""


def rotate(x: Tensor, positions: Tensor, rotary_dim: int, base: float) -> Tensor:
    """Rotate the first ``rotary_dim`` dimensions of every head by its token's position (halves paired, as GPT-NeoX).

    Args:
        x: [n, heads, dim].
        positions: int64 [n], position within the document.
        rotary_dim: even, at most ``dim``; the other dimensions pass through.
        base: angle i is ``position * base ** (-2 i / rotary_dim)``, in fp32.

    Returns:
        A tensor of ``x``'s shape and dtype.
    """
    half = rotary_dim // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) * (2.0 / rotary_dim)
    angles = positions.to(device=x.device, dtype=torch.float32)[:, None] * base**-exponents  # [n, half]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [n, 1, half]
    first, second, rest = x[..., :half].float(), x[..., half:rotary_dim].float(), x[..., rotary_dim:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    cu_seqlens = layout.local_document_bounds
    outputs = []
    for first, end in document_groups(cu_seqlens):
        tokens = slice(cu_seqlens[first], cu_seqlens[end])
        mask = None
        if end - first > 1:
            mask = document_mask([bound - cu_seqlens[first] for bound in cu_seqlens[first : end + 1]])
        # [m, heads, dim] -> [1, heads, m, dim]
        q_part, k_part, v_part = (x[tokens].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = scaled_dot_product_attention(
            q_part, k_part, v_part, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out.squeeze(0).transpose(0, 1))  # [m, heads, dim]
    return torch.cat(outputs)


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = layout.local_cu_seqlens.to(q.device)
    longest = layout.max_document_length
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def packed_softmax_attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    """Causal softmax attention of every document with itself, scaled by 1/sqrt(dim).

    Args:
        q: [n, heads, dim].
        k, v: [n, groups, dim], ``groups`` divides ``heads``.
        layout: document bounds of the ``n`` tokens.

    Returns:
        [n, heads, dim] in ``q``'s dtype.
    """
    return _attend_on_gpu(q, k, v, layout) if q.is_cuda else _attend_on_cpu(q, k, v, layout)


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

    def nbytes(self) -> int:
        """Memory, with what is not filled yet."""
        return 0 if self._memory is None else self._memory.nbytes


class KeyValueCache:
    """The keys and values of every token of every sequence.

    Args:
        sequences: how many there are.
    """

    def __init__(self, sequences: int) -> None:
        self._keys = [_Growing() for _ in range(sequences)]
        self._values = [_Growing() for _ in range(sequences)]

    def attend(self, active: Sequence[int], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Causal softmax attention of each document to its whole sequence so far.

        Args:
            active: the sequence of each document.
            q: [n, heads, dim], rotated.
            k, v: [n, groups, dim], keys rotated; they are kept.
            cu_seqlens: the documents' bounds.

        Returns:
            [n, heads, dim] in ``q``'s dtype.
        """
        outputs = []
        for sequence, (start, stop) in zip(active, pairwise(cu_seqlens), strict=True):
            keys = self._keys[sequence].append(k[start:stop])  # [all, groups, dim]
            values = self._values[sequence].append(v[start:stop])
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

    def nbytes(self) -> int:
        """Memory, with what is not filled yet."""
        return sum(rows.nbytes() for rows in (*self._keys, *self._values))


class PackedCoreAttention(MegatronModule):
    """Core attention for megatron-core's ``SelfAttention``, whose own refuses packs.

    It rotates queries and keys by the layout's positions: megatron-core's packed rotary embedding assumes Transformer
    Engine's padded documents. Over a context-parallel group it is ring attention. Holds no parameters.
    """

    def __init__(
        self, config: EngineConfig, layer_number: int, *, pg_collection: ProcessGroupCollection, **interface: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        self.rotary_dim = rotary_dim(config.model)
        self.rotary_base = config.model.rotary_base

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Any,
        **interface: Any,
    ) -> Tensor:
        """Attend within each document.

        Args:
            query: [n, 1, heads, dim].
            key, value: [n, 1, groups, dim].
            attention_mask: unused.
            packed_seq_params: carries the ``SequenceLayout``.
            interface: mask type and bias, which megatron-core passes to every core attention; unused.

        Returns:
            [n, 1, heads * dim].
        """
        params = batch_params(packed_seq_params, self.cp_group.size())
        layout, caches = layout_of(params), params.caches
        positions = layout.positions
        if caches is not None:
            positions = caches.positions(positions, layout.local_document_bounds)
        q = rotate(query.squeeze(1), positions, self.rotary_dim, self.rotary_base)
        k = rotate(key.squeeze(1), positions, self.rotary_dim, self.rotary_base)
        v = value.squeeze(1)
        if caches is not None:
            cache = caches.of_layer(self.layer_number, KeyValueCache)
            out = cache.attend(caches.active, q, k, v, layout.local_document_bounds)
        elif layout.context_parallel_size > 1:
            out = ring_attention(q, k, v, layout, self.cp_group)
        else:
            out = packed_softmax_attention(q, k, v, layout)
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}


class Softmax(LayerKind):
    """The kind ``softmax``."""

    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> ModuleSpec:
        """megatron-core's ``SelfAttention`` around our core."""
        return ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=provider.column_parallel_linear(),
                core_attention=PackedCoreAttention,
                linear_proj=provider.row_parallel_linear(),
            ),
        )

    def matrices(
        self, module: Any, prefix: str, config: EngineConfig, groups: ProcessGroupCollection
    ) -> Iterator[tuple[Tensor, Matrix]]:
        """The query, key, value and output matrices."""
        model, rank = config.model, module.tp_group.rank()
        dim, hidden = model.kv_channels, model.hidden_size
        heads, key_values = model.num_attention_heads, model.num_query_groups
        per_group = heads // key_values
        name, gain = f"{prefix}.attention", inner_gain(model)
        held = module.linear_qkv.weight.data
        first = rank * held.shape[0]
        # Rows: for each group its q heads, then k, then v. With more ranks than groups a rank's rows start anywhere.
        for block in range(first // dim, math.ceil((first + held.shape[0]) / dim)):
            group, slot = divmod(block, per_group + 2)
            low, high = max(block * dim, first), min((block + 1) * dim, first + held.shape[0])
            inside = low - block * dim
            if slot < per_group:
                matrix = Matrix(f"{name}.q", heads * dim, hidden, first_row=(group * per_group + slot) * dim + inside)
            else:
                part, scale = ("k", 1.0) if slot == per_group else ("v", gain)
                row = group * dim + inside
                matrix = Matrix(f"{name}.{part}", key_values * dim, hidden, first_row=row, gain=scale)
            yield held[low - first : high - first], matrix
        out = module.linear_proj.weight.data
        column = rank * out.shape[1]
        yield out, Matrix(f"{name}.out", hidden, heads * dim, first_column=column, gain=output_gain(model))
