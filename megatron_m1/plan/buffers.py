"""megatron-core's buffers of parameters and gradients, and the share of the optimizer's state that one rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.pipeline import StageLayers
from megatron_m1.config.resolve import data_parallel_size
from megatron_m1.plan.parameters import chunk_parameters
from megatron_m1.shapes.kind import Parameter

START, END = 64, 128
"""Numbers at whose multiples a parameter begins and a buffer ends, besides those that its ranks divide."""
STATE_BYTES = 8
"""AdamW's two moments in fp32."""
MASTER_BYTES = 4
"""The fp32 copy of a 16-bit parameter."""


@dataclass(frozen=True)
class Buffer:
    """Parameters of one type and of one set of copies (all ranks of DP x CP, or EDP), end to end."""

    numbers: int
    """With what pads it."""
    used: int
    """Of them, those that are parameters."""
    itemsize: int
    """Bytes of a parameter."""
    is_expert: bool
    ranks: int
    """Over which gradients are reduced and the optimizer's state is spread."""

    @property
    def parameter_bytes(self) -> int:
        """On every rank."""
        return self.numbers * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """On every rank: gradients are summed in fp32."""
        return self.numbers * 4

    @property
    def optimizer_bytes(self) -> int:
        """On the fullest rank."""
        numbers = min(self.used, self.numbers // self.ranks)
        return numbers * (STATE_BYTES + (MASTER_BYTES if self.itemsize < 4 else 0))


def chunk_buffers(config: ResolvedConfig, chunk: StageLayers, world_size: int) -> list[Buffer]:
    """The buffers of one model chunk.

    Where gradients are reduced while the backward pass runs, the first stage's buffers are cut into buckets of 40
    million numbers or more, each of which is padded: a few thousand numbers more than here.

    Args:
        config: resolved.
        chunk: of a pipeline rank.
        world_size: of the run.
    """
    parallel = config.parallel
    copies = data_parallel_size(parallel, world_size) * parallel.context_parallel_size
    stage = world_size // parallel.pipeline_model_parallel_size
    expert_copies = stage // (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
    groups: dict[tuple[int, bool], list[Parameter]] = {}
    for parameter in chunk_parameters(config.model, chunk):
        size = 4 if parameter.is_fp32 or config.train.precision == "fp32" else 2
        groups.setdefault((size, parameter.split == "expert"), []).append(parameter)
    return [
        _buffer(config, parameters, itemsize, is_expert, expert_copies if is_expert else copies)
        for (itemsize, is_expert), parameters in groups.items()
    ]


def _buffer(
    config: ResolvedConfig, parameters: Iterable[Parameter], itemsize: int, is_expert: bool, ranks: int
) -> Buffer:
    used = numbers = 0
    for parameter in parameters:
        count, size = parameter.pieces(config.parallel)
        used += count * size
        numbers += count * _up(size, START)
    return Buffer(_up(numbers, math.lcm(ranks, END)), used, itemsize, is_expert, ranks)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
