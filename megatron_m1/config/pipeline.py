"""Which layers lie on which pipeline stage, from Megatron's layout notation or an even split."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_m1.config.tree import ModelConfig, ParallelConfig
from megatron_m1.printing import counted


@dataclass(frozen=True)
class StageLayers:
    """What one model chunk of one pipeline rank holds: some layers, and perhaps an end of the model."""

    layers: range
    """Layer indices over the whole model, from 0."""
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Stages:
    """The chunks of every pipeline rank."""

    by_rank: tuple[tuple[StageLayers, ...], ...]
    """``by_rank[pipeline rank][virtual stage]``."""

    @property
    def chunks_per_rank(self) -> int:
        """Virtual stages; 1 without interleaving."""
        return len(self.by_rank[0])

    @property
    def most_layers(self) -> int:
        """Layers of the largest chunk."""
        return max(len(chunk.layers) for chunks in self.by_rank for chunk in chunks)


def plan_stages(model: ModelConfig, parallel: ParallelConfig) -> Stages:
    """Place the layers on the stages.

    Raises:
        ValueError: the layers don't fit the stages, or the layout is no layout of this model; one line with the fix.
    """
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    if virtual > 1 and pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size = {virtual} needs pipeline_model_parallel_size above 1"
        )
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        return _place(_parse_layout(layout, model, parallel), pipeline)
    if model.num_layers % (pipeline * virtual):
        raise ValueError(
            f"model.num_layers = {model.num_layers} does not split evenly into pipeline {pipeline} x virtual {virtual} "
            f"= {pipeline * virtual} stages: change them or give parallel.pipeline_model_parallel_layout"
        )
    each = "t" * (model.num_layers // (pipeline * virtual))
    texts = [each] * (pipeline * virtual)
    texts[0] = "E" + texts[0]
    texts[-1] += "L"
    return _place(texts, pipeline)


def _parse_layout(layout: str, model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Unroll the notation into one text a stage, e.g. ``E(t|)*2tL`` -> ``["Et", "t", "tL"]``, and check it."""
    name = f"parallel.pipeline_model_parallel_layout = {layout!r}"
    text = layout.replace(",", "").replace(" ", "")
    text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    text = re.sub(r"(.)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    strange = sorted(set(text) - set("EtL|"))
    if strange:
        raise ValueError(f"{name} has {strange[0]!r}: use E (embedding), t (layer), L (head and loss), | and *count")
    if text.count("E") != 1 or not text.startswith("E") or text.count("L") != 1 or not text.endswith("L"):
        raise ValueError(f"{name} must begin with its only E (embedding) and end with its only L (head and loss)")
    if text.count("t") != model.num_layers:
        raise ValueError(
            f"{name} places {counted(text.count('t'), 'layer')}, but model.num_layers = {model.num_layers}"
        )
    stages = text.split("|")
    pipeline = parallel.pipeline_model_parallel_size
    if len(stages) % pipeline:
        raise ValueError(
            f"{name} has {len(stages)} stages, not a multiple of parallel.pipeline_model_parallel_size = {pipeline}"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and virtual * pipeline != len(stages):
        raise ValueError(
            f"{name} has {len(stages)} stages, but pipeline {pipeline} x virtual {virtual} = {pipeline * virtual}: "
            "leave out virtual_pipeline_model_parallel_size, the layout gives it"
        )
    if pipeline == 1 and len(stages) > 1:
        raise ValueError(f"{name} has {len(stages)} stages, but parallel.pipeline_model_parallel_size = 1")
    return stages


def _place(texts: list[str], pipeline: int) -> Stages:
    """Deal the stages out in order: stage ``v * pipeline + r`` is virtual stage ``v`` of rank ``r``."""
    chunks = []
    first = 0
    for text in texts:
        count = text.count("t")
        chunks.append(StageLayers(range(first, first + count), "E" in text, "L" in text))
        first += count
    return Stages(tuple(tuple(chunks[rank::pipeline]) for rank in range(pipeline)))
