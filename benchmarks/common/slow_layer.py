"""One expert layer over links and experts that are slow on purpose: what it takes, and what its list says it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.expert_ranks import process_groups
from benchmarks.common.slow_experts import SlowExperts
from benchmarks.common.slow_link import SlowLink
from megatron_m1.parallel.expert.layer import Call, expert_layer
from megatron_m1.parallel.expert.links import Links, Work
from megatron_m1.parallel.expert.plan import plan_exchange
from megatron_m1.parallel.expert.schedule import Kind, Lane, Operation
from megatron_m1.parallel.expert.simulate import Shape, run_ranks


@dataclass(frozen=True)
class Pace:
    """How slow."""

    row_seconds: float
    """Of a pass (forward, data, weights) of one row through its expert."""
    latency: float
    """Seconds of a message."""
    rate: float
    """Bytes a second of a rank's messages."""


@dataclass(frozen=True)
class Load:
    """Of one rank, all groups together."""

    rows: float
    """Rows that it receives over EP."""
    row_bytes: int
    expert_ranks: int
    tensor_ranks: int

    def seconds(self, operation: Operation, groups: int, pace: Pace) -> float:
        """Of one operation in its lane, with groups of equal sizes."""
        rows = self.rows / groups
        if operation.kind in (Kind.EXPERTS, Kind.WEIGHTS):
            return rows * self.tensor_ranks * pace.row_seconds
        if operation.kind in (Kind.DISPATCH, Kind.COMBINE):
            return pace.latency + rows * self.row_bytes * (self.expert_ranks - 1) / self.expert_ranks / pace.rate
        if operation.kind in (Kind.GATHER, Kind.REDUCE):
            return pace.latency + rows * self.row_bytes * (self.tensor_ranks - 1) / pace.rate
        return pace.latency if operation.lane is not Lane.COMPUTE else 0.0

    def simulated(self, groups: int, pace: Pace) -> float:
        """Seconds there and back, by the lists alone, in a process that waits itself."""
        found = 0.0
        for backward in (False, True):
            shape = Shape(groups, self.expert_ranks, self.tensor_ranks, backward)
            spans = run_ranks(shape, lambda _, operation: self.seconds(operation, groups, pace), blocking=True)[0]
            found += max(span.ended for span in spans.values())
        return found

    def one_after_the_other(self, pace: Pace) -> float:
        """Seconds there and back where nothing overlaps."""
        lists = (Shape(1, self.expert_ranks, self.tensor_ranks, backward).schedule() for backward in (False, True))
        return sum(self.seconds(operation, 1, pace) for operations in lists for operation in operations)


class WaitedLink(SlowLink):
    """A ``SlowLink`` that returns when a message has arrived: nothing travels beside anything else."""

    def _slowly(self, work: Work, arriving: Tensor) -> Work:
        slow = super()._slowly(work, arriving)
        slow.wait()
        return slow


@dataclass(frozen=True)
class Bench:
    """A layer whose experts are loaded evenly; in every group too, if the number of groups divides ``tokens / 4``."""

    expert_ranks: int
    tensor_ranks: int
    tokens: int = 192
    """Of each rank."""
    hidden: int = 64
    ffn: int = 8
    experts: int = 4

    @property
    def ranks(self) -> int:
        """Of the layer."""
        return self.expert_ranks * self.tensor_ranks

    @property
    def load(self) -> Load:
        """Of each rank, with two experts a token and float32 rows."""
        return Load(2 * self.tokens, 4 * self.hidden, self.expert_ranks, self.tensor_ranks)


def measure(
    rank: int, world_size: int, bench: Bench, pace: Pace, groups: list[int], rounds: int
) -> tuple[float, list[float]]:
    """Seconds there and back of the slowest rank, the best of ``rounds``.

    Returns:
        With one group and nothing beside anything else, and with each number of ``groups``.
    """
    ranks = process_groups(bench.expert_ranks, bench.tensor_ranks, rank)
    assert ranks.both is not None
    draw = torch.Generator().manual_seed(rank)
    held = bench.experts // bench.expert_ranks
    shapes = [(2 * bench.ffn, bench.hidden), (bench.hidden, bench.ffn)] * held
    hidden = torch.randn(bench.tokens, bench.hidden, generator=draw).requires_grad_()
    weights = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    places = torch.arange(bench.tokens)[:, None] + torch.arange(2)
    chosen = torch.zeros(bench.tokens, bench.experts, dtype=torch.bool).scatter_(1, places % bench.experts, True)
    probs = (0.5 * chosen).requires_grad_()
    experts, grad = SlowExperts(pace.row_seconds), torch.ones_like(hidden)

    def run(kind: type[SlowLink], count: int) -> float:
        links = Links(
            *(
                None if group is None else kind(group, latency=pace.latency, bytes_per_second=pace.rate)
                for group in (ranks.expert, ranks.tensor)
            )
        )
        plan = plan_exchange(chosen, count, ranks)
        dist.barrier(ranks.both)
        begun = time.monotonic()
        output = expert_layer(hidden, probs, weights, Call(plan, links, experts))
        torch.autograd.grad(output, [hidden, probs, *weights], grad)
        seconds = torch.tensor(time.monotonic() - begun)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=ranks.both)
        return float(seconds)

    run(SlowLink, 1)
    settings = [(WaitedLink, 1), *((SlowLink, count) for count in groups)]
    times = [[run(*setting) for setting in settings] for _ in range(rounds)]
    best = [min(column) for column in zip(*times, strict=True)]
    return best[0], best[1:]
