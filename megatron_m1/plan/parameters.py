"""Parameters of a model, from its shapes alone: the one place that counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_m1.config import ModelConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.shapes.kind import Parameter
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_ffns, layer_mixers

EMBEDDING, NORMS, HEAD = "embedding", "norms", "head"
"""Groups of what is in every model; the kinds of its layers name the others."""


@dataclass(frozen=True)
class Counts:
    """Parameters by group, in the order in which tables show them."""

    groups: Mapping[str, int]

    def __getitem__(self, group: str) -> int:
        return self.groups.get(group, 0)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.groups.values())

    @property
    def without_vocabulary(self) -> int:
        """All parameters outside the embedding and the head."""
        return self.total - self[EMBEDDING] - self[HEAD]

    def __add__(self, other: Counts) -> Counts:
        return Counts({group: self[group] + other[group] for group in {**self.groups, **other.groups}})


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a whole model: all, those that one token passes through (its top-k experts), and by layer."""

    all: Counts
    active: Counts
    layers: tuple[Counts, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return self.all.total


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Count a whole model in every way."""
    return ParameterCounts(model_counts(model), model_counts(model, active=True), tuple(layer_counts(model)))


def _count(parameters: Iterable[Parameter], size: Callable[[Parameter], int]) -> Counts:
    groups: dict[str, int] = {}
    for parameter in parameters:
        groups[parameter.group] = groups.get(parameter.group, 0) + size(parameter)
    return Counts(groups)


def _vocabulary(model: ModelConfig, group: str) -> Parameter:
    is_fp32 = group == HEAD and model.lm_head_precision == "fp32"
    return Parameter("weight", (model.vocab_size, model.hidden_size), group, "tensor", is_fp32=is_fp32)


def _norm(model: ModelConfig) -> Parameter:
    return Parameter("weight", (model.hidden_size,), NORMS)


def _layers(model: ModelConfig, size: Callable[[Parameter], int]) -> list[Counts]:
    """Counts of every layer; those of one pair of kinds are counted once."""
    kinds = list(zip(layer_mixers(model), layer_ffns(model), strict=True))
    norms = [_norm(model), _norm(model)]
    counts = {
        (mixer, ffn): _count([*MIXERS[mixer].parameters(model), *FFNS[ffn].parameters(model), *norms], size)
        for mixer, ffn in dict.fromkeys(kinds)
    }
    return [counts[pair] for pair in kinds]


def kind_parameters(model: ModelConfig) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters of the model's mixers and of its feed-forward networks, every kind once."""
    mixers = [p for name in dict.fromkeys(layer_mixers(model)) for p in MIXERS[name].parameters(model)]
    ffns = [p for name in dict.fromkeys(layer_ffns(model)) for p in FFNS[name].parameters(model)]
    return mixers, ffns


def layer_counts(model: ModelConfig) -> list[Counts]:
    """Count every layer, over the whole model."""
    return _layers(model, lambda parameter: parameter.total)


def model_counts(model: ModelConfig, *, active: bool = False) -> Counts:
    """Count the whole model, or with ``active`` only what one token passes through (its top-k experts)."""

    def size(parameter: Parameter) -> int:
        return parameter.active if active else parameter.total

    outside = [_vocabulary(model, EMBEDDING), _norm(model), _vocabulary(model, HEAD)]
    mixers, ffns = kind_parameters(model)
    order = [EMBEDDING, *(p.group for p in [*mixers, *ffns]), NORMS, HEAD]
    return sum([*_layers(model, size), _count(outside, size)], Counts(dict.fromkeys(order, 0)))


def chunk_parameters(model: ModelConfig, chunk: StageLayers) -> list[Parameter]:
    """All parameters of one model chunk, those of each layer by themselves."""
    mixers, ffns = layer_mixers(model), layer_ffns(model)
    of_kinds = {kind: MIXERS[kind].parameters(model) for kind in dict.fromkeys(mixers)}
    of_ffns = {kind: FFNS[kind].parameters(model) for kind in dict.fromkeys(ffns)}
    norms = [_norm(model), _norm(model)]
    found = [_vocabulary(model, EMBEDDING)] if chunk.has_embedding else []
    for index in chunk.layers:
        found += [*of_kinds[mixers[index]], *of_ffns[ffns[index]], *norms]
    return found + ([_norm(model), _vocabulary(model, HEAD)] if chunk.has_head else [])


def rank_counts(model: ModelConfig, parallel: ResolvedParallelConfig) -> list[Counts]:
    """Count what one rank of each pipeline stage holds (all its virtual chunks; ranks of a stage hold equally many).

    Args:
        model: shape of the model.
        parallel: a mesh that fits it.

    Returns:
        One entry a pipeline rank.
    """

    def held(parameter: Parameter) -> int:
        return parameter.held(parallel)

    stages = plan_stages(model, parallel)
    return [
        sum((_count(chunk_parameters(model, chunk), held) for chunk in chunks), Counts({})) for chunks in stages.by_rank
    ]
