"""Memory of one rank of every pipeline stage, in bytes, from a resolved configuration alone.

What is exact: parameters, gradients and optimizer state, with all padding. What is counted by formula, of one document
a pack and balanced experts: what autograd keeps (``shapes``), times the micro-batches that the schedule has under way.
What is an estimate from above: what a backward pass needs for a while.

Not counted: what CUDA, NCCL and the allocator's fragments take (``hardware.yaml`` leaves a share of the memory to
them), checkpoints that are being written, and copies that gloo makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.config.resolve import data_parallel_size
from megatron_m1.plan.buffers import chunk_buffers
from megatron_m1.plan.schedule import most_kept
from megatron_m1.shapes.kind import LayerShape, Share
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_ffns, layer_mixers

TOKEN_IDS = 8
"""Bytes of a token's id."""
CHECKPOINT_STATE = 5 * 5056
"""Bytes of the random generators' states that megatron-core keeps with a recomputed chunk, on the CPU's memory."""


@dataclass(frozen=True)
class StageMemory:
    """What the fullest rank of a pipeline stage holds at most, bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, of all micro-batches under way."""
    states: int
    """Lightning states that entered the rank's segments, of all layers and micro-batches under way."""
    head: int
    """Logits that are kept, and what the head's backward pass needs beyond what the layers' does."""
    recomputed: int
    """Layers, or parts of one, that are computed again at a time."""
    working: int
    """What the backward pass of a layer needs for a while."""
    exchange: int
    """Buffers of the exchanges with other ranks."""
    under_way: tuple[int, ...]
    """Micro-batches of each of the rank's chunks, when it keeps most."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(field.name for field in fields(StageMemory) if field.name != "under_way")
"""Names of the parts, in the order of tables."""


def share_of(config: ResolvedConfig, *, on_gpu: bool) -> Share:
    """One micro-batch on a rank."""
    train = config.train
    recomputed = frozenset(train.recompute_modules) if train.recompute_granularity == "selective" else frozenset()
    tokens = config.padded_pack_tokens // config.parallel.context_parallel_size
    return Share(config.parallel, tokens, 4 if train.precision == "fp32" else 2, on_gpu, recomputed)


def micro_batches(config: ResolvedConfig, world_size: int) -> int:
    """Of one rank and step."""
    return config.train.global_batch_size // data_parallel_size(config.parallel, world_size)


class _Planner:
    """The kept bytes of layers and chunks, by kind."""

    def __init__(self, config: ResolvedConfig, *, on_gpu: bool) -> None:
        self.config, self.model = config, config.model
        self.share = share_of(config, on_gpu=on_gpu)
        self.every = Share(config.parallel, self.share.tokens, self.share.itemsize, on_gpu)
        self.mixers = [MIXERS[name] for name in layer_mixers(self.model)]
        self.ffns = [FFNS[name] for name in layer_ffns(self.model)]
        self.hidden = self.share.outside * self.model.hidden_size * self.share.itemsize
        """Of the residual stream."""
        # On a CPU 16 bits are normalised by operations of torch's that keep two fp32 tensors, and not their input.
        self.input_is_kept = on_gpu or self.share.itemsize == 4
        kept = self.share.itemsize if self.input_is_kept else 2 * 4
        self.norm = self.share.outside * (self.model.hidden_size * kept + 4)
        """Kept by a norm: its input, and a number a token."""

    def kinds(self, layers: Iterable[int]) -> list[LayerShape]:
        """Every kind of the layers' sub-layers, once."""
        return list(dict.fromkeys(kind for index in layers for kind in (self.mixers[index], self.ffns[index])))

    def layer(self, index: int, share: Share) -> int:
        """Kept of a layer: what two norms keep, and what the sub-layers say."""
        kinds: tuple[LayerShape, LayerShape] = (self.mixers[index], self.ffns[index])
        return 2 * self.norm + sum(kind.saved_bytes(self.model, share) for kind in kinds)

    def groups(self, layers: range) -> list[range]:
        """The chunks of layers that full recomputation takes together."""
        size = self.config.train.recompute_num_layers
        return [layers[first : first + size] for first in range(0, len(layers), size)]

    def kept(self, chunk: StageLayers) -> int:
        """Of one micro-batch in one model chunk, without logits and states."""
        found = 0
        if chunk.has_embedding:
            found += TOKEN_IDS * self.share.tokens * (1 if self.share.tensor == 1 else 2)
        if self.config.train.recompute_granularity == "full":
            host = 0 if self.share.on_gpu else CHECKPOINT_STATE
            found += len(self.groups(chunk.layers)) * (self.hidden + host)
        else:
            found += sum(self.layer(index, self.share) for index in chunk.layers)
        if chunk.has_head:
            # The final norm's, its output, and of each token a maximum, a sum, its target's logit, loss and label.
            found += self.norm + self.hidden + self.share.tokens * (4 * 4 + TOKEN_IDS)
        return found

    def states(self, chunk: StageLayers) -> int:
        """Entered states of one micro-batch in one model chunk."""
        state = sum(self.mixers[index].state_bytes(self.model) for index in chunk.layers)
        return self.share.entering_states * state // self.share.tensor

    def recomputed(self, chunks: Iterable[StageLayers]) -> int:
        """The most that is computed again at a time."""
        train = self.config.train
        layers = [chunk.layers for chunk in chunks]
        if train.recompute_granularity == "full":
            groups = [group for each in layers for group in self.groups(each)]
            # A group's input is kept already.
            known = self.hidden if self.input_is_kept else 0
            sizes = [sum(self.layer(index, self.every) for index in group) - known for group in groups]
            return max(sizes, default=0)
        kinds = self.kinds(index for each in layers for index in each)
        again = [kind.saved_bytes(self.model, self.every) - kind.saved_bytes(self.model, self.share) for kind in kinds]
        return max(again, default=0)

    def logits(self) -> tuple[int, int]:
        """Bytes of the fp32 logits that are kept between forward and backward, and of the largest chunk's."""
        model, share = self.model, self.share
        rows, vocabulary = share.outside, model.vocab_size // share.tensor
        each = 4 if self.head_itemsize == 4 else 6
        most = max(1, math.ceil(model.lm_head_chunk_mib * 2**20) // (share.tensor * vocabulary * each))
        size = math.ceil(rows / math.ceil(rows / most))
        last = rows - (math.ceil(rows / size) - 1) * size
        return last * share.tensor * vocabulary * 4, size * share.tensor * vocabulary * each

    @property
    def head_itemsize(self) -> int:
        """Bytes of a number of the head's weight."""
        return 4 if self.model.lm_head_precision == "fp32" else self.share.itemsize

    def head_backward(self) -> int:
        """A chunk's logits where they are not the ones that were kept, and two tensors of the weight's shape.

        One is a placeholder of its gradient for autograd, the other the product that is added to the gradients: cuBLAS
        adds in place where all is fp32.
        """
        kept, largest = self.logits()
        weight = self.model.vocab_size // self.share.tensor * self.model.hidden_size * self.head_itemsize
        adds_in_place = self.share.on_gpu and self.head_itemsize == 4
        return max(0, largest - kept) + weight * (1 if adds_in_place else 2)

    def exchange(self, layers: list[int]) -> int:
        """Gathered tokens of sequence parallelism, a pipeline's messages, and the largest of the layers' exchanges."""
        parallel = self.config.parallel
        gathered = self.share.tokens * self.model.hidden_size * self.share.itemsize if self.share.tensor > 1 else 0
        messages = 2 * self.hidden if parallel.pipeline_model_parallel_size > 1 else 0
        each = [kind.exchange_bytes(self.model, self.share) for kind in self.kinds(layers)]
        return gathered + messages + max(each, default=0)


def stage_memory(config: ResolvedConfig, world_size: int, *, on_gpu: bool) -> list[StageMemory]:
    """Plan the memory of every pipeline stage's fullest rank.

    Args:
        config: resolved for ``world_size``.
        world_size: of the run.
        on_gpu: kernels of GPUs keep other things than those of CPUs. What is said of CPUs is compared with what the
            trainer allocates (``tests/plan/test_memory.py``), in fp32; what is said of GPUs follows from what the
            kernels save and was not run.

    Returns:
        One entry a pipeline rank.
    """
    planner = _Planner(config, on_gpu=on_gpu)
    stages = plan_stages(config.model, config.parallel).by_rank
    return [_of_rank(planner, rank, chunks, world_size) for rank, chunks in enumerate(stages)]


def _of_rank(planner: _Planner, rank: int, chunks: tuple[StageLayers, ...], world_size: int) -> StageMemory:
    config = planner.config
    buffers = [buffer for chunk in chunks for buffer in chunk_buffers(config, chunk, world_size)]
    logits, _ = planner.logits()
    kept = [planner.kept(chunk) for chunk in chunks]
    states = [planner.states(chunk) for chunk in chunks]
    head = [logits if chunk.has_head else 0 for chunk in chunks]
    _, under_way = most_kept(
        [sum(parts) for parts in zip(kept, states, head, strict=True)],
        config.parallel.pipeline_model_parallel_size,
        rank,
        micro_batches(config, world_size),
    )

    def all_under_way(sizes: list[int]) -> int:
        return sum(size * count for size, count in zip(sizes, under_way, strict=True))

    layers = [index for chunk in chunks for index in chunk.layers]
    recomputed = planner.recomputed(chunks)
    working = max((kind.working_bytes(planner.model, planner.share) for kind in planner.kinds(layers)), default=0)
    backward = planner.head_backward() if any(chunk.has_head for chunk in chunks) else 0
    # The head's backward pass is over when the layers' begins, and so are the logits of that micro-batch.
    beyond = max(0, backward + (logits if any(head) else 0) - recomputed - working)
    return StageMemory(
        parameters=sum(buffer.parameter_bytes for buffer in buffers),
        gradients=sum(buffer.gradient_bytes for buffer in buffers),
        optimizer=sum(buffer.optimizer_bytes for buffer in buffers),
        activations=all_under_way(kept),
        states=all_under_way(states),
        head=max(0, all_under_way(head) - max(head)) + beyond,
        recomputed=recomputed,
        working=working,
        exchange=planner.exchange(layers),
        under_way=under_way,
    )
