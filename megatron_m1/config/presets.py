"""Named model shapes. A preset is a function that returns a fresh ``ModelConfig``, and a length of its packs."""

from __future__ import annotations

from collections.abc import Callable

from megatron_m1.config.tree import Config, DataConfig, ModelConfig


def m1_456b() -> ModelConfig:
    """MiniMax-M1 as released: 456,089,655,296 parameters, 45.9B of them active per token outside embedding and head."""
    return ModelConfig(rotary_base=10_000_000.0)


def m1_mid() -> ModelConfig:
    """M1's proportions on one 80 GB GPU: 16 layers, 8 experts."""
    return ModelConfig(
        num_layers=16,
        hidden_size=1536,
        num_attention_heads=16,
        kv_channels=128,
        num_query_groups=2,
        moe_ffn_hidden_size=2816,
        num_moe_experts=8,
        vocab_size=200_064,
    )


def tiny() -> ModelConfig:
    """Both layer kinds and eight experts at a size that trains on two CPU cores in minutes."""
    return ModelConfig(
        num_layers=8,
        hidden_size=128,
        num_attention_heads=4,
        kv_channels=32,
        num_query_groups=2,
        moe_ffn_hidden_size=192,
        num_moe_experts=8,
        vocab_size=4096,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "m1-mid": m1_mid, "m1-456b": m1_456b}


def preset(name: str) -> ModelConfig:
    """Return the preset called ``name``.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


SEQ_LENGTHS = {"tiny": 512}
"""``data.seq_length`` of presets for which ``DataConfig``'s own is too long: tiny trains 4,096 tokens a step."""


def preset_config(name: str) -> Config:
    """Return the configuration in which nothing but the preset is chosen.

    Raises:
        ValueError: no preset has that name.
    """
    model = preset(name)
    return Config(preset=name, model=model, data=DataConfig(seq_length=SEQ_LENGTHS.get(name, DataConfig.seq_length)))
