"""The kinds that there are, by name, and which of them each layer of a model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import FfnShape, LayerShape, MixerShape
from megatron_m1.shapes.lightning import Lightning
from megatron_m1.shapes.moe import MixtureOfExperts
from megatron_m1.shapes.softmax import Softmax

MIXERS: dict[str, MixerShape] = {"lightning": Lightning(), "softmax": Softmax()}
"""What ``model.mixers`` may name."""
FFNS: dict[str, FfnShape] = {"moe": MixtureOfExperts()}
"""What ``model.ffns`` may name."""


def add_kind[Kind](registry: dict[str, Kind], name: str, kind: Kind) -> None:
    """Put ``kind`` into a registry, of shapes or of layers.

    Raises:
        ValueError: the name is taken.
    """
    if name in registry:
        raise ValueError(f"layer kind {name!r} exists already, as {type(registry[name]).__name__}: give another name")
    registry[name] = kind


def register_mixer(name: str, shape: MixerShape) -> None:
    """Let ``model.mixers`` name a kind; ``layers.registry.register_mixer`` gives its module.

    Raises:
        ValueError: the name is taken.
    """
    add_kind(MIXERS, name, shape)


def register_ffn(name: str, shape: FfnShape) -> None:
    """Let ``model.ffns`` name a kind; ``layers.registry.register_ffn`` gives its module.

    Raises:
        ValueError: the name is taken.
    """
    add_kind(FFNS, name, shape)


def layer_mixers(model: ModelConfig) -> list[str]:
    """Name of every layer's mixer, over the whole model.

    Raises:
        ValueError: ``model.mixers`` names no layers, an unknown kind, or does not divide them; one line.
    """
    return _each_layer("mixers", model.mixers, MIXERS, model.num_layers)


def layer_ffns(model: ModelConfig) -> list[str]:
    """Name of every layer's feed-forward network, over the whole model; raises as ``layer_mixers``."""
    return _each_layer("ffns", model.ffns, FFNS, model.num_layers)


def _each_layer(field: str, names: Sequence[str], known: Mapping[str, LayerShape], layers: int) -> list[str]:
    choice = ", ".join(known)
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise ValueError(f"model.{field} has {strange!r}, which is no kind of layer: choose from {choice}")
    if not names:
        raise ValueError(f"model.{field} is empty: name a kind, or several that are repeated: {choice}")
    count = len(names)
    if layers % count:
        fits = max(1, round(layers / count)) * count
        raise ValueError(
            f"model.num_layers = {layers} is not a multiple of the {count} kinds that model.{field} lists: {fits} "
            "would be, or list as many kinds as there are layers"
        )
    return list(names) * (layers // count)


def _kinds(model: ModelConfig) -> list[LayerShape]:
    """The kinds of a model, each once."""
    mixers = [MIXERS[name] for name in dict.fromkeys(layer_mixers(model))]
    return [*mixers, *(FFNS[name] for name in dict.fromkeys(layer_ffns(model)))]


def check_layers(model: ModelConfig) -> None:
    """Check the names of the kinds, and every kind's own fields; raises ``ValueError`` of one line."""
    for kind in _kinds(model):
        kind.check(model)


def check_layers_split(model: ModelConfig, parallel: ResolvedParallelConfig) -> None:
    """Check that the mesh can cut every kind; raises ``ValueError`` of one line."""
    for kind in _kinds(model):
        kind.check_split(model, parallel)


def check_layers_device(model: ModelConfig, *, precision: str, has_gpu: bool) -> None:
    """Check that every kind runs on the device; raises ``ValueError`` of one line."""
    for kind in _kinds(model):
        kind.check_device(model, precision=precision, has_gpu=has_gpu)
