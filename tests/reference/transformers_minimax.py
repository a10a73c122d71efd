"""transformers' own MiniMax as the truth for the whole model: hub keys translated, its rotary fault patched in one
place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax


@contextmanager
def partial_rotary(rotary_dim: int) -> Iterator[None]:
    """Rotate the first ``rotary_dim`` dimensions only, as MiniMax's released code does.

    transformers 5.23 ignores ``rotary_dim`` for this model and rotates the whole head.
    """
    full = modeling_minimax.apply_rotary_pos_emb

    def first_dimensions(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        turned_q, turned_k = full(q[..., :rotary_dim], k[..., :rotary_dim], cos, sin, unsqueeze_dim)
        return torch.cat((turned_q, q[..., rotary_dim:]), -1), torch.cat((turned_k, k[..., rotary_dim:]), -1)

    with patch.object(modeling_minimax, "apply_rotary_pos_emb", first_dimensions):
        yield


def build(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    experts: int,
    vocab: int,
    rotary_dim: int,
    rope_theta: float,
    softmax_every: int,
    alpha: float,
    seed: int,
) -> MiniMaxForCausalLM:
    """A random fp32 model in evaluation mode, with matrices at a scale where every path matters."""
    config = MiniMaxConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        layer_types=["full_attention" if (i + 1) % softmax_every == 0 else "linear_attention" for i in range(layers)],
        full_attn_alpha_factor=alpha,
        linear_attn_alpha_factor=alpha,
        mlp_alpha_factor=alpha,
    )
    config._attn_implementation = "eager"
    model = MiniMaxForCausalLM(config).float().eval()
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1.0 / (rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model
