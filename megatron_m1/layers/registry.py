"""The modules of the kinds that ``shapes.registry`` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_m1.config import ModelConfig
from megatron_m1.layers.kind import LayerKind
from megatron_m1.layers.lightning import Lightning
from megatron_m1.layers.moe import MixtureOfExperts
from megatron_m1.layers.softmax import Softmax
from megatron_m1.shapes.registry import add_kind, layer_ffns, layer_mixers

MIXERS: dict[str, LayerKind] = {"lightning": Lightning(), "softmax": Softmax()}
FFNS: dict[str, LayerKind] = {"moe": MixtureOfExperts()}


def register_mixer(name: str, kind: LayerKind) -> None:
    """Give the mixers that ``shapes.registry.register_mixer`` has named their module.

    Raises:
        ValueError: the name is taken.
    """
    add_kind(MIXERS, name, kind)


def register_ffn(name: str, kind: LayerKind) -> None:
    """Give the networks that ``shapes.registry.register_ffn`` has named their module.

    Raises:
        ValueError: the name is taken.
    """
    add_kind(FFNS, name, kind)


def layer_kinds(model: ModelConfig) -> list[tuple[LayerKind, LayerKind]]:
    """Mixer and feed-forward network of every layer, over the whole model.

    Raises:
        ValueError: ``shapes`` knows a kind that has no module here; or as ``shapes.registry.layer_mixers``.
    """
    return [
        (_kind(MIXERS, mixer), _kind(FFNS, ffn))
        for mixer, ffn in zip(layer_mixers(model), layer_ffns(model), strict=True)
    ]


def _kind(registry: Mapping[str, LayerKind], name: str) -> LayerKind:
    if name not in registry:
        raise ValueError(f"layer kind {name!r} has a shape and no module: register it in layers.registry as well")
    return registry[name]


def sub_layers(model: Any) -> Iterator[tuple[str, LayerKind, Any]]:
    """Global layer name, kind and module of every sub-layer of one pipeline chunk."""
    kinds = layer_kinds(model.config.model)
    for layer in model.decoder.layers:
        mixer, ffn = kinds[layer.layer_number - 1]
        name = f"layers.{layer.layer_number - 1}"
        yield name, mixer, layer.self_attention
        yield name, ffn, layer.mlp
