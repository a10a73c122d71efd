"""Core of the softmax layers: rotary positions by document, then causal attention inside each document (GQA)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.pack import batch_params, layout_of
from megatron_m1.parallel.block_attention import document_groups, document_mask
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_attention import ring_attention


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
        self.rotary_dim = int(config.kv_channels * config.rotary_percent)
        self.rotary_base = config.rotary_base

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
            out = caches.attend(self.layer_number, q, k, v, layout.local_document_bounds)
        elif layout.context_parallel_size > 1:
            out = ring_attention(q, k, v, layout, self.cp_group)
        else:
            out = packed_softmax_attention(q, k, v, layout)
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}
