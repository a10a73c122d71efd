"""Where transformers' MiniMax keeps each of our weights: written for the tests, from the released shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _qkvg(attention: Any, read: str, heads: int) -> Tensor:
    qkv, gate = _of(attention.qkv_proj, read), _of(attention.output_gate, read)
    hidden = qkv.shape[1]
    dim = gate.shape[0] // heads
    # per head: 3 * dim rows of q, k, v, then its dim rows of the gate
    rows = torch.cat((qkv.reshape(heads, 3 * dim, hidden), gate.reshape(heads, dim, hidden)), dim=1)
    return rows.reshape(-1, hidden)


def _grouped_qkv(attention: Any, read: str, groups: int) -> Tensor:
    q, k, v = (_of(getattr(attention, f"{part}_proj"), read) for part in "qkv")
    hidden = q.shape[1]
    rows = [x.reshape(groups, -1, hidden) for x in (q, k, v)]
    return torch.cat(rows, dim=1).reshape(-1, hidden)


def _of(module: Any, read: str) -> Tensor:
    weight: Tensor | None = module.weight if read == "data" else module.weight.grad
    assert weight is not None
    return weight.detach()


def expected(model: Any, read: str = "data") -> Iterator[tuple[str, Tensor]]:
    """Yield (our global name, full tensor) for every parameter, its value ("data") or its gradient ("grad").

    Layers are numbered globally and experts by their global index: ``decoder.layers.3.mlp.experts.local_experts.5...``.
    """
    config = model.config
    yield "embedding.word_embeddings.weight", _of(model.model.embed_tokens, read)
    yield "decoder.final_layernorm.weight", _of(model.model.norm, read)
    yield "output_layer.weight", _of(model.lm_head, read)
    for index, layer in enumerate(model.model.layers):
        name = f"decoder.layers.{index}"
        yield f"{name}.input_layernorm.weight", _of(layer.input_layernorm, read)
        yield f"{name}.pre_mlp_layernorm.weight", _of(layer.post_attention_layernorm, read)
        attention = layer.self_attn
        if config.layer_types[index] == "linear_attention":
            yield f"{name}.self_attention.linear_qkvg.weight", _qkvg(attention, read, config.num_attention_heads)
            yield f"{name}.self_attention.linear_proj.weight", _of(attention.out_proj, read)
            yield f"{name}.self_attention.norm.weight", _of(attention.norm, read)
        else:
            yield f"{name}.self_attention.linear_qkv.weight", _grouped_qkv(attention, read, config.num_key_value_heads)
            yield f"{name}.self_attention.linear_proj.weight", _of(attention.o_proj, read)
        yield f"{name}.mlp.router.weight", _of(layer.mlp.gate, read)
        experts = layer.mlp.experts
        for expert in range(config.num_local_experts):
            for ours, theirs in (("linear_fc1", experts.gate_up_proj), ("linear_fc2", experts.down_proj)):
                source = theirs.data if read == "data" else theirs.grad
                assert source is not None
                yield f"{name}.mlp.experts.local_experts.{expert}.{ours}.weight", source[expert].detach()
