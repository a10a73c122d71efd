"""Bytes that one rank of each pipeline stage exchanges in a step, by process group and collective.

They are those that go through the process groups (``tests/plan/test_traffic.py`` counts them), of packs of one document
and balanced experts; the rank of a context-parallel group that sends most stands for all. Left out are messages that
only report or normalise: a few numbers a step, and the table of experts' loads that all ranks add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.plan.buffers import chunk_buffers
from megatron_m1.plan.memory import micro_batches, share_of
from megatron_m1.plan.parameters import chunk_parameters
from megatron_m1.plan.ranks import first_group
from megatron_m1.shapes.kind import Collective, Message, Share
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_ffns, layer_mixers

OPTIMIZERS = 2
"""megatron-core's, one of the experts and one of all else. Unless gathering overlaps, each gathers all parameters."""


@dataclass(frozen=True)
class Traffic:
    """What one rank exchanges in a step over one kind of group."""

    group: str
    collective: Collective
    size: float
    """Bytes of whole messages: of all ranks' parts, or of what the rank sends."""
    nvlink: float
    """Of them, bytes that leave the rank for others of its node."""
    network: float
    """Bytes that leave the rank for other nodes."""


def stage_messages(
    config: ResolvedConfig, world_size: int, *, on_gpu: bool
) -> list[dict[tuple[str, Collective], float]]:
    """Bytes of whole messages of a step, by group and collective, of every pipeline stage.

    Groups of one rank are left out.
    """
    stages = plan_stages(config.model, config.parallel).by_rank
    share, packs = share_of(config, on_gpu=on_gpu), micro_batches(config, world_size)
    sizes: dict[str, int] = {}
    found = []
    for rank, chunks in enumerate(stages):
        total: dict[tuple[str, Collective], float] = {}
        each = [message for chunk in chunks for message in _chunk_messages(config, chunk, share)]
        each += _pipeline_messages(config, rank, len(stages), len(chunks), share)
        layers_again = config.train.recompute_granularity == "full"
        sums = [(m.group, m.collective, packs * m.sent(share.recomputed, layers_again=layers_again)) for m in each]
        sums += [gradient for chunk in chunks for gradient in _gradient_messages(config, chunk, world_size)]
        for group, collective, size in sums:
            if group not in sizes:
                sizes[group] = len(first_group(group, config.parallel, world_size))
            if size and sizes[group] > 1:
                total[group, collective] = total.get((group, collective), 0) + size
        found.append(total)
    return found


def _chunk_messages(config: ResolvedConfig, chunk: StageLayers, share: Share) -> Iterator[Message]:
    """Of a micro-batch."""
    model = config.model
    mixers, ffns = layer_mixers(model), layer_ffns(model)
    of_kinds = {name: MIXERS[name].messages(model, share) for name in dict.fromkeys(mixers)}
    # Experts exchange tokens in other groups than the dense layers'.
    of_ffns = {name: FFNS[name].messages(model, share) for name in dict.fromkeys(ffns)}
    for index in chunk.layers:
        yield from of_kinds[mixers[index]]
        yield from of_ffns[ffns[index]]
    tokens = share.tokens * model.hidden_size
    hidden = tokens * share.itemsize
    if chunk.has_embedding:
        yield Message("TP", "reduce-scatter", hidden, 0, is_repeated=False)
        yield Message("TP", "all-gather", 0, hidden)
    if chunk.has_head:
        weight = 4 if model.lm_head_precision == "fp32" else share.itemsize
        yield Message("TP", "all-gather", hidden, hidden, is_repeated=False)
        yield Message("TP", "reduce-scatter", 0, tokens * weight)
        # Of each token its greatest logit; then a sum and the target's logit.
        yield Message("TP", "all-reduce", 3 * 4 * share.tokens, 0, is_repeated=False)


def _pipeline_messages(config: ResolvedConfig, rank: int, ranks: int, chunks: int, share: Share) -> Iterator[Message]:
    """A micro-batch's activations to the next chunk of the model, and gradients to the one before."""
    size = share.outside * config.model.hidden_size * share.itemsize
    for chunk in range(chunks):
        place = chunk * ranks + rank
        forward, backward = place < ranks * chunks - 1, place > 0
        yield Message("PP", "send", size * forward, size * backward, is_repeated=False)


def _gradient_messages(
    config: ResolvedConfig, chunk: StageLayers, world_size: int
) -> Iterator[tuple[str, Collective, float]]:
    """Of a step: gradients reduced and parameters gathered over their copies, and summed over the sequence's parts."""
    gathers = 1 if config.parallel.overlap_param_gather else OPTIMIZERS
    for buffer in chunk_buffers(config, chunk, world_size):
        group = "EDP" if buffer.is_expert else "DP x CP"
        yield group, "reduce-scatter", buffer.gradient_bytes
        yield group, "all-gather", gathers * buffer.parameter_bytes
    undivided = (p for p in chunk_parameters(config.model, chunk) if p.split == "none")
    yield "TP", "all-reduce", 4 * sum(p.total for p in undivided)


def over_links(
    group: str, collective: Collective, size: float, config: ResolvedConfig, world_size: int, node: int
) -> Traffic:
    """Say how many bytes of messages leave a rank, inside its node and to others.

    A node's ranks in the group share what has to come from other nodes. Convention of rings: n ranks gather or scatter
    with (n - 1) / n of the whole message a rank, and add up with twice that.

    Args:
        group: name of the groups.
        collective: kind.
        size: bytes of whole messages.
        config: resolved.
        world_size: of the run.
        node: GPUs of a node.
    """
    members = first_group(group, config.parallel, world_size)
    ranks = len(members)
    nodes: dict[int, int] = {}
    for member in members:
        nodes[member // node] = nodes.get(member // node, 0) + 1
    local = ranks / len(nodes)
    if collective == "send" and group == "PP":
        inside = len(nodes) == 1
        return Traffic(group, collective, size, size * inside, size * (not inside))
    if collective in ("all-to-all", "send"):
        # A rank sends a message of its own to each of the others; CP's count only what leaves the rank.
        of = ranks - 1 if collective == "send" else ranks
        return Traffic(group, collective, size, size * (local - 1) / of, size * (ranks - local) / of)
    times = 2 if collective == "all-reduce" else 1
    nvlink = times * size * (ranks - 1) / ranks if local > 1 else 0.0
    network = times * size * (len(nodes) - 1) / len(nodes) / local
    return Traffic(group, collective, size, nvlink, network)


def stage_traffic(config: ResolvedConfig, world_size: int, *, on_gpu: bool, node: int) -> list[list[Traffic]]:
    """What a rank of every pipeline stage exchanges in a step, and over which links; arguments as in ``over_links``."""
    return [
        [over_links(group, kind, size, config, world_size, node) for (group, kind), size in sorted(messages.items())]
        for messages in stage_messages(config, world_size, on_gpu=on_gpu)
    ]
