"""The formulas against what torch counts while a plain model, written here, runs forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_m1.config import ModelConfig
from megatron_m1.config.presets import PRESETS, m1_456b, preset
from megatron_m1.plan.flops import flops_by_part, training_flops

DOCUMENTS = [3, 1, 4]


def small_model() -> ModelConfig:
    return ModelConfig(
        num_layers=3,
        hidden_size=24,
        num_attention_heads=6,
        kv_channels=10,
        num_query_groups=2,
        mixers=["lightning", "softmax", "lightning"],
        moe_ffn_hidden_size=14,
        num_moe_experts=5,
        moe_router_topk=3,
        vocab_size=37,
    )


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def softmax_attention(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """One document [n, h]: every query meets just the keys up to itself."""
    heads, width, groups = config.num_attention_heads, config.kv_channels, config.num_query_groups
    q = (x @ weight(x.shape[1], heads * width)).view(-1, heads, width)
    k = (x @ weight(x.shape[1], groups * width)).view(-1, groups, width).repeat_interleave(heads // groups, dim=1)
    v = (x @ weight(x.shape[1], groups * width)).view(-1, groups, width).repeat_interleave(heads // groups, dim=1)
    rows = []
    for i in range(len(x)):
        scores = torch.bmm(k[: i + 1].transpose(0, 1), q[i].unsqueeze(2))  # [heads, i + 1, 1]
        rows.append(torch.bmm(scores.softmax(1).transpose(1, 2), v[: i + 1].transpose(0, 1)).flatten())
    return torch.stack(rows) @ weight(heads * width, x.shape[1])


def lightning_attention(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """One document [n, h], token by token."""
    heads, width = config.num_attention_heads, config.kv_channels
    q, k, v = ((x @ weight(x.shape[1], heads * width)).view(-1, heads, width) for _ in range(3))
    state = torch.zeros(heads, width, width)
    rows = []
    for i in range(len(x)):
        state = 0.9 * state + torch.bmm(k[i].unsqueeze(2), v[i].unsqueeze(1))
        rows.append(torch.bmm(q[i].unsqueeze(1), state).flatten())
    gate = x @ weight(x.shape[1], heads * width)
    return (gate.sigmoid() * torch.stack(rows)) @ weight(heads * width, x.shape[1])


def experts(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    probabilities, _ = (x @ weight(x.shape[1], config.num_moe_experts)).softmax(-1).topk(config.moe_router_topk)
    out = torch.zeros_like(x)
    for choice in range(config.moe_router_topk):
        up, gate = (x @ weight(x.shape[1], config.moe_ffn_hidden_size) for _ in range(2))
        down = (torch.nn.functional.silu(gate) * up) @ weight(config.moe_ffn_hidden_size, x.shape[1])
        out = out + probabilities[:, choice : choice + 1] * down
    return out


def test_against_counted_products() -> None:
    config = small_model()
    with FlopCounterMode(display=False) as counter:
        for length in DOCUMENTS:
            x = weight(length, config.hidden_size)
            hidden = x
            for layer in range(config.num_layers):
                attention = softmax_attention if config.mixers[layer] == "softmax" else lightning_attention
                hidden = hidden + attention(hidden, config)
                hidden = hidden + experts(hidden, config)
            (hidden @ weight(config.hidden_size, config.vocab_size)).sum().backward()
    assert training_flops(config, DOCUMENTS) == counter.get_total_flops()


def test_every_part_against_counted_products() -> None:
    """Of one document: each part alone, as often as the model has it."""
    config, length = small_model(), 6

    def counted(run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with FlopCounterMode(display=False) as counter:
            run(weight(length, config.hidden_size)).sum().backward()
        return counter.get_total_flops() / length

    def router(x: torch.Tensor) -> torch.Tensor:
        return x @ weight(x.shape[1], config.num_moe_experts)

    def head(x: torch.Tensor) -> torch.Tensor:
        return x @ weight(x.shape[1], config.vocab_size)

    layers = config.num_layers
    assert flops_by_part(config, length) == {
        "lightning attention": 2 * counted(lambda x: lightning_attention(x, config)),
        "softmax attention": counted(lambda x: softmax_attention(x, config)),
        "experts": layers * (counted(lambda x: experts(x, config)) - counted(router)),
        "router": layers * counted(router),
        "head": counted(head),
    }


def test_the_parts_are_the_whole() -> None:
    for name in PRESETS:
        model = preset(name)
        assert sum(flops_by_part(model, 4096).values()) == pytest.approx(
            training_flops(model, [4096]) / 4096, rel=1e-12
        )


def test_m1_is_six_flops_per_active_parameter() -> None:
    """45.9B active parameters per token outside embedding and head, 1.23B in the head; attention itself is extra."""
    config = m1_456b()
    flops = training_flops(config, [1])
    active = 45.945e9 + 200_064 * 6144
    assert flops / 6 == pytest.approx(active, rel=0.01)
    assert flops / 6 > active


def test_documents_cost_less_than_one_sequence() -> None:
    config = small_model()
    saved = config.num_attention_heads * config.kv_channels * 4 * 3 * (8 * 9 // 2 - (6 + 1 + 10))
    assert training_flops(config, [8]) - training_flops(config, DOCUMENTS) == saved


def test_empty_document_is_refused() -> None:
    with pytest.raises(ValueError, match="a document has 0 tokens"):
        training_flops(small_model(), [3, 0])
