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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.config import ModelConfig
from megatron_m1.convert.families.minimax_m1.rotary import native_rows, our_rows
from megatron_m1.printing import counted
from megatron_m1.shapes import registry
from megatron_m1.shapes.kind import LayerShape, Parameter
from megatron_m1.shapes.registry import layer_ffns, layer_mixers
from megatron_m1.shapes.softmax import rotary_dim

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


_ATTENTION, _HUB_ATTENTION = f"{_LAYER}.self_attention", f"{_HUB_LAYER}.self_attn"
_MLP, _HUB_MLP = f"{_LAYER}.mlp", f"{_HUB_LAYER}.block_sparse_moe"


def _lightning(model: ModelConfig) -> list[Rule]:
    hidden, dim, heads = model.hidden_size, model.kv_channels, model.num_attention_heads
    return [
        Rule(
            f"{_ATTENTION}.linear_qkvg.weight",
            ((f"{_HUB_ATTENTION}.qkv_proj.weight", 3 * dim), (f"{_HUB_ATTENTION}.output_gate.weight", dim)),
            hidden,
            groups=heads,
        ),
        Rule(f"{_ATTENTION}.norm.weight", ((f"{_HUB_ATTENTION}.norm.weight", heads * dim),), None),
        Rule(f"{_ATTENTION}.linear_proj.weight", ((f"{_HUB_ATTENTION}.out_proj.weight", hidden),), heads * dim),
    ]


def _softmax(model: ModelConfig) -> list[Rule]:
    hidden, dim, heads, key_values = (
        model.hidden_size,
        model.kv_channels,
        model.num_attention_heads,
        model.num_query_groups,
    )
    return [
        Rule(
            f"{_ATTENTION}.linear_qkv.weight",
            (
                (f"{_HUB_ATTENTION}.q_proj.weight", heads // key_values * dim),
                (f"{_HUB_ATTENTION}.k_proj.weight", dim),
                (f"{_HUB_ATTENTION}.v_proj.weight", dim),
            ),
            hidden,
            groups=key_values,
        ),
        Rule(f"{_ATTENTION}.linear_proj.weight", ((f"{_HUB_ATTENTION}.o_proj.weight", hidden),), heads * dim),
    ]


def _moe(model: ModelConfig) -> list[Rule]:
    hidden, inner = model.hidden_size, model.moe_ffn_hidden_size
    experts, hub_experts = f"{_MLP}.experts.experts", f"{_HUB_MLP}.experts.{{expert}}"
    router = ((f"{_HUB_MLP}.gate.weight", model.num_moe_experts),)
    return [
        Rule(f"{_MLP}.router.weight", router, hidden, keeps_fp32=True),
        Rule(
            f"{experts}.linear_fc1.weight",
            ((f"{hub_experts}.w1.weight", inner), (f"{hub_experts}.w3.weight", inner)),
            hidden,
            stacked=True,
        ),
        Rule(f"{experts}.linear_fc2.weight", ((f"{hub_experts}.w2.weight", hidden),), inner, stacked=True),
    ]


MIXERS: dict[str, Callable[[ModelConfig], list[Rule]]] = {"lightning": _lightning, "softmax": _softmax}
"""How the hub spells each kind of mixer, in the order in which its tensors are written."""
FFNS: dict[str, Callable[[ModelConfig], list[Rule]]] = {"moe": _moe}
"""The same of feed-forward networks."""


def check_spelled(model: ModelConfig) -> None:
    """Check that the hub has words for every kind of layer, for the residual and for the router.

    Raises:
        ValueError: it has none; one line.
    """
    for field, names, known in (("mixers", layer_mixers(model), MIXERS), ("ffns", layer_ffns(model), FFNS)):
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise ValueError(
                f"model.{field} has {strange!r}, for which MiniMax-M1's format has no words: only models of "
                f"{', '.join(known)} can be converted"
            )
    if model.residual != "deepnorm":
        raise ValueError(f"model.residual = {model.residual} can't be converted: readers of MiniMax-M1 know deepnorm")
    if model.moe_router_score_function != "softmax":
        raise ValueError(
            f"model.moe_router_score_function = {model.moe_router_score_function} can't be converted: readers of "
            "MiniMax-M1 know softmax"
        )


def _units_of(rule: Rule, model: ModelConfig, layer: int | None, *, native_heads: bool) -> Iterator[WeightPiece]:
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


def _unspelled(parameter: Parameter, place: str) -> Iterator[WeightPiece]:
    """Our tensors of a kind for which the hub has no words: they are read from our checkpoints, and have no parts."""
    stacked = parameter.split == "expert"
    for expert in range(parameter.copies) if stacked else [None]:
        yield WeightPiece(
            ours=f"{place}.{parameter.name}",
            shape=(parameter.copies, *parameter.shape) if stacked else parameter.shape,
            expert=expert,
            groups=1,
            parts=(),
            keeps_fp32=False,
        )


def _expert_bias(model: ModelConfig, layer: int) -> WeightPiece:
    """What a router chooses by beside its scores: a buffer, for which the hub has no word either."""
    return WeightPiece(
        ours=f"{_MLP.format(layer=layer)}.router.expert_bias",
        shape=(model.num_moe_experts,),
        expert=None,
        groups=1,
        parts=(),
        keeps_fp32=True,
    )


def units(model: ModelConfig, *, native_heads: bool = False) -> list[WeightPiece]:
    """Everything that a model of this shape consists of: embedding, layer by layer, final norm, head.

    Args:
        model: its shape.
        native_heads: rows of rotated heads are in native transformers' order.
    """
    hidden, vocabulary = model.hidden_size, model.vocab_size

    def of_rules(rules: Iterable[Rule], layer: int | None = None) -> list[WeightPiece]:
        return [unit for rule in rules for unit in _units_of(rule, model, layer, native_heads=native_heads)]

    def of_kind(
        spelled: Callable[[ModelConfig], list[Rule]] | None, shape: LayerShape, layer: int, place: str
    ) -> list[WeightPiece]:
        if spelled is not None:
            return of_rules(spelled(model), layer)
        return [
            unit
            for parameter in shape.parameters(model)
            for unit in _unspelled(parameter, f"{_LAYER.format(layer=layer)}.{place}")
        ]

    norms = (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"))
    norm_rules = [
        Rule(f"{_LAYER}.{ours}.weight", ((f"{_HUB_LAYER}.{hub}.weight", hidden),), columns=None) for ours, hub in norms
    ]
    found = of_rules([Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", vocabulary),), hidden)])
    for layer, (mixer, ffn) in enumerate(zip(layer_mixers(model), layer_ffns(model), strict=True)):
        found += of_rules(norm_rules, layer)
        found += of_kind(MIXERS.get(mixer), registry.MIXERS[mixer], layer, "self_attention")
        found += of_kind(FFNS.get(ffn), registry.FFNS[ffn], layer, "mlp")
        if ffn == "moe" and model.moe_router_enable_expert_bias:
            found.append(_expert_bias(model, layer))
    return found + of_rules(
        [
            Rule("decoder.final_layernorm.weight", (("model.norm.weight", hidden),), None),
            Rule("output_layer.weight", (("lm_head.weight", vocabulary),), hidden),
        ]
    )


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
            faults.append(f"{fault} {counted(len(names), 'tensor')}: {shown}")
    if faults:
        raise ValueError(f"{place} {'; it '.join(faults)}")
