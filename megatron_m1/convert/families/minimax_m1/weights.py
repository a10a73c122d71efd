"""The one map between our tensors and the hub's, read in both directions.

A rule says which hub tensors hold the numbers of one of ours, and how their rows lie in it: our rows are ``groups``
blocks, each holding the next rows of every part in turn. Nothing else happens to a weight:

====================  =======================================  ==================================================
ours                  the hub's parts                          rows of ours
====================  =======================================  ==================================================
linear_qkvg           qkv_proj, output_gate                    for each head its q, k, v (as qkv_proj has them) and
                                                               then its gate rows, so that tensor ranks split heads
linear_qkv            q_proj, k_proj, v_proj                   for each key/value head its query heads, k and v
experts.linear_fc1    experts.E.w1, experts.E.w3               gate rows, then up rows; experts stacked in front
experts.linear_fc2    experts.E.w2                             experts stacked in front
everything else       one tensor                               as they are
====================  =======================================  ==================================================

Native transformers' own folders can have the rows of q_proj and k_proj in another order, see ``rotary``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_m1.config import ModelConfig
from megatron_m1.convert.families.minimax_m1.rotary import native_rows, our_rows

NATIVE_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""What native transformers saves besides weights, in every lightning layer. vLLM fails on them."""
_ROTATED = (".q_proj.weight", ".k_proj.weight")
"""What the hub calls the projections that are rotated."""
_LAYER = "decoder.layers.{layer}"
_HUB_LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Rule:
    """How one kind of tensor of ours is made of the hub's."""

    ours: str
    """Key in our checkpoints, with ``{layer}``."""
    parts: tuple[tuple[str, int], ...]
    """The hub's names, with ``{layer}`` and ``{expert}``, and the rows that each gives to one group."""
    columns: int | None
    """Length of a row; None for a vector."""
    groups: int = 1
    layers: Literal["none", "every", "lightning", "softmax"] = "every"
    """In which layers it is; none for what is outside them."""
    stacked: bool = False
    """Ours has one entry an expert along a dimension in front."""
    keeps_fp32: bool = False
    """Stays fp32 whatever dtype the rest has."""


@dataclass(frozen=True)
class Part:
    """A hub tensor."""

    name: str
    shape: tuple[int, ...]
    native_heads: tuple[int, int] | None = None
    """(dimensions of a head, how many of them are rotated) where rows are in native transformers' order."""

    def from_ours(self, rows: Tensor) -> Tensor:
        """Its rows as it has them, from rows in our order."""
        if self.native_heads is None:
            return rows
        return native_rows(rows, head_dim=self.native_heads[0], rotated=self.native_heads[1])

    def in_our_order(self, tensor: Tensor) -> Tensor:
        """Its rows in our order, from the tensor itself."""
        if self.native_heads is None:
            return tensor
        return our_rows(tensor, head_dim=self.native_heads[0], rotated=self.native_heads[1])


@dataclass(frozen=True)
class WeightPiece:
    """The smallest piece that is converted at once: one tensor of ours, or one expert of a stacked one."""

    ours: str
    shape: tuple[int, ...]
    """Of our whole tensor."""
    expert: int | None
    """Index along the first dimension; None for a tensor that is no stack of experts."""
    groups: int
    parts: tuple[Part, ...]
    keeps_fp32: bool

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the unit begins in our whole tensor."""
        return (self.expert or 0, *(0 for _ in self.shape[1:]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The unit's extent in our whole tensor, which has as many dimensions."""
        return self.shape if self.expert is None else (1, *self.shape[1:])

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return torch.Size(self.sizes).numel()

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """What it is stored as where the rest is ``wanted``."""
        return torch.float32 if self.keeps_fp32 else wanted


def cast(unit: WeightPiece, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, a part of ``unit`` or all of it, in ``dtype``.

    Raises:
        ValueError: fp16 can't hold its numbers.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and bool(result.isinf().any()) and not bool(tensor.isinf().any()):
        raise ValueError(f"{unit.ours} has numbers beyond 65504, the largest of fp16: take bf16 or fp32")
    return result


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """All rules for a model of this shape, in the order in which a layer's tensors are written."""
    hidden, dim, heads, kv_heads = (
        model.hidden_size,
        model.kv_channels,
        model.num_attention_heads,
        model.num_query_groups,
    )
    vocabulary, inner = model.vocab_size, model.moe_ffn_hidden_size
    attention, hub_attention = f"{_LAYER}.self_attention", f"{_HUB_LAYER}.self_attn"
    experts, hub_experts = f"{_LAYER}.mlp.experts.experts", f"{_HUB_LAYER}.block_sparse_moe.experts.{{expert}}"
    norms = (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"))
    return (
        Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", vocabulary),), hidden, layers="none"),
        *(
            Rule(f"{_LAYER}.{ours}.weight", ((f"{_HUB_LAYER}.{hub}.weight", hidden),), columns=None)
            for ours, hub in norms
        ),
        Rule(
            f"{attention}.linear_qkvg.weight",
            ((f"{hub_attention}.qkv_proj.weight", 3 * dim), (f"{hub_attention}.output_gate.weight", dim)),
            hidden,
            groups=heads,
            layers="lightning",
        ),
        Rule(f"{attention}.norm.weight", ((f"{hub_attention}.norm.weight", heads * dim),), None, layers="lightning"),
        Rule(
            f"{attention}.linear_proj.weight",
            ((f"{hub_attention}.out_proj.weight", hidden),),
            heads * dim,
            layers="lightning",
        ),
        Rule(
            f"{attention}.linear_qkv.weight",
            (
                (f"{hub_attention}.q_proj.weight", heads // kv_heads * dim),
                (f"{hub_attention}.k_proj.weight", dim),
                (f"{hub_attention}.v_proj.weight", dim),
            ),
            hidden,
            groups=kv_heads,
            layers="softmax",
        ),
        Rule(
            f"{attention}.linear_proj.weight",
            ((f"{hub_attention}.o_proj.weight", hidden),),
            heads * dim,
            layers="softmax",
        ),
        Rule(
            f"{_LAYER}.mlp.router.weight",
            ((f"{_HUB_LAYER}.block_sparse_moe.gate.weight", model.num_moe_experts),),
            hidden,
            keeps_fp32=True,
        ),
        Rule(
            f"{experts}.linear_fc1.weight",
            ((f"{hub_experts}.w1.weight", inner), (f"{hub_experts}.w3.weight", inner)),
            hidden,
            stacked=True,
        ),
        Rule(f"{experts}.linear_fc2.weight", ((f"{hub_experts}.w2.weight", hidden),), inner, stacked=True),
        Rule("decoder.final_layernorm.weight", (("model.norm.weight", hidden),), None, layers="none"),
        Rule("output_layer.weight", (("lm_head.weight", vocabulary),), hidden, layers="none"),
    )


def is_softmax_layer(model: ModelConfig, layer: int) -> bool:
    """Whether layer ``layer`` (from 0) is softmax attention."""
    return (layer + 1) % model.attention_period == 0


def rotary_dim(model: ModelConfig) -> int:
    """Dimensions of each softmax head that are rotated."""
    return int(model.kv_channels * model.rotary_percent)


def _units_of(rule: Rule, model: ModelConfig, layer: int | None, native_heads: bool) -> Iterator[WeightPiece]:
    heads = (model.kv_channels, rotary_dim(model)) if native_heads else None
    row = () if rule.columns is None else (rule.columns,)
    rows = rule.groups * sum(count for _, count in rule.parts)
    for expert in range(model.num_moe_experts) if rule.stacked else [None]:
        yield WeightPiece(
            ours=rule.ours.format(layer=layer),
            shape=(model.num_moe_experts, rows, *row) if rule.stacked else (rows, *row),
            expert=expert,
            groups=rule.groups,
            parts=tuple(
                Part(
                    name.format(layer=layer, expert=expert),
                    (rule.groups * count, *row),
                    heads if name.endswith(_ROTATED) else None,
                )
                for name, count in rule.parts
            ),
            keeps_fp32=rule.keeps_fp32,
        )


def units(model: ModelConfig, *, native_heads: bool = False) -> list[WeightPiece]:
    """Everything that a model of this shape consists of: embedding, layer by layer, final norm, head.

    Args:
        model: its shape.
        native_heads: rows of rotated heads are in native transformers' order.
    """
    found: list[WeightPiece] = []
    every = rules(model)
    for rule in every[:1]:
        found += _units_of(rule, model, None, native_heads)
    for layer in range(model.num_layers):
        kind = "softmax" if is_softmax_layer(model, layer) else "lightning"
        for rule in every:
            if rule.layers in ("every", kind):
                found += _units_of(rule, model, layer, native_heads)
    for rule in every[1:]:
        if rule.layers == "none":
            found += _units_of(rule, model, None, native_heads)
    return found


def to_ours(unit: WeightPiece, parts: Sequence[Tensor]) -> Tensor:
    """Put hub tensors together as ours.

    Args:
        unit: what they are.
        parts: one tensor for each of ``unit.parts``, shaped as those say, of one dtype.

    Returns:
        A tensor of shape ``unit.sizes``; the only part's memory where nothing moves.
    """
    if len(parts) == 1:
        return parts[0].view(unit.sizes)
    # [groups * rows of the part, ...] -> [groups, rows of the part, ...], joined: [groups, all rows, ...]
    ordered = [part.in_our_order(tensor) for part, tensor in zip(unit.parts, parts, strict=True)]
    joined = torch.cat([rows.view(unit.groups, -1, *rows.shape[1:]) for rows in ordered], dim=1)
    return joined.view(unit.sizes)


def to_hub(unit: WeightPiece, ours: Tensor) -> list[Tensor]:
    """Take a tensor of ours apart; the inverse of ``to_ours``.

    Args:
        unit: what it is.
        ours: shaped ``unit.sizes``, contiguous.

    Returns:
        One tensor for each of ``unit.parts``; views, not contiguous where rows of several parts interleave.
    """
    if len(unit.parts) == 1:
        return [ours.view(unit.parts[0].shape)]
    # [1, rows, ...] or [rows, ...] -> [groups, all rows, ...] -> per part [groups, its rows, ...]
    grouped = ours.view(unit.groups, -1, *unit.parts[0].shape[1:])
    rows = [part.shape[0] // unit.groups for part in unit.parts]
    pieces = grouped.split(rows, dim=1)
    return [part.from_ours(piece.reshape(part.shape)) for piece, part in zip(pieces, unit.parts, strict=True)]


def is_native_buffer(name: str) -> bool:
    """Whether a hub name is one of the buffers that native transformers saves."""
    return re.fullmatch(rf"model\.layers\.\d+\.self_attn\.({'|'.join(NATIVE_BUFFERS)})", name) is not None


def check_names(wanted: Iterable[str], found: Iterable[str], place: str) -> None:
    """Check that a place has exactly the tensors that the map knows.

    Raises:
        ValueError: some are missing, or some have no place in the map; names them.
    """
    wanted, found = set(wanted), set(found)
    faults = []
    for names, fault in ((wanted - found, "lacks"), (found - wanted, "has, and the map does not know,")):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            faults.append(f"{fault} {len(names)} tensors: {shown}")
    if faults:
        raise ValueError(f"{place} {'; it '.join(faults)}")
