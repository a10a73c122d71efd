"""What an expert layer does when, as recorded; and that groups save time where messages take some."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.expert_ranks import process_groups
from benchmarks.common.slow_experts import SlowExperts
from benchmarks.common.slow_layer import Load, Pace
from benchmarks.common.slow_link import SlowLink
from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne
from megatron_m1.parallel.expert.layer import Call, Experts, expert_layer
from megatron_m1.parallel.expert.links import Links
from megatron_m1.parallel.expert.plan import plan_exchange
from megatron_m1.parallel.expert.schedule import Lane, schedule
from megatron_m1.runtime.pool import WorkerPool
from tests.parallel.expert.ranks import Case, shard

Span = tuple[str, float, float]
GROUPS = 4


class Layer:
    """One layer's forward and backward pass, over links that are slow."""

    def __init__(self, rank: int, case: Case, *, latency: float) -> None:
        ranks = process_groups(case.expert_ranks, case.tensor_ranks, rank)
        self.hidden, self.probs, self.chosen, self.grad = case.inputs(rank)
        weights = shard(case.weights(), case, rank // case.tensor_ranks, rank % case.tensor_ranks)
        self.leaves = [x.requires_grad_() for x in (self.hidden, self.probs, *weights)]
        self.ranks = ranks
        self.slow(latency, float("inf"))

    def slow(self, latency: float, rate: float) -> None:
        """Give the links other speeds."""
        groups = (self.ranks.expert, self.ranks.tensor)
        self.links = Links(
            *(None if group is None else SlowLink(group, latency=latency, bytes_per_second=rate) for group in groups)
        )

    def run(self, groups: int, experts: Experts | None = None) -> float:
        """Seconds of one pass there and back, on the slowest rank."""
        assert self.ranks.both is not None
        plan = plan_exchange(self.chosen, groups, self.ranks)
        begun = time.monotonic()
        output = expert_layer(self.hidden, self.probs, self.leaves[2:], Call(plan, self.links, experts or OneByOne()))
        torch.autograd.grad(output, self.leaves, self.grad)
        seconds = torch.tensor(time.monotonic() - begun)
        torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX, group=self.ranks.both)
        return float(seconds)


def time_line(rank: int, world_size: int, case: Case) -> list[Span]:
    """Every marked span of a forward and a backward pass, in the order of their starts."""
    layer = Layer(rank, case, latency=0.005)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        layer.run(case.groups)
    spans = [
        (event.name.removeprefix("expert: "), event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.name.startswith("expert: ")
    ]
    return sorted(spans, key=lambda span: span[1])


@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), [(2, 1), (2, 2)])
def test_ranks_do_what_the_list_says(expert_ranks: int, tensor_ranks: int, workers: WorkerPool) -> None:
    case = Case(expert_ranks, tensor_ranks, GROUPS, (20,) * (expert_ranks * tensor_ranks), hidden=32, ffn=32)
    by_rank = workers.run(time_line, case, world_size=case.ranks)
    listed = [
        f"{operation}{' backward' if backward else ''}"
        for backward in (False, True)
        for operation in schedule(GROUPS, expert_ranks, tensor_ranks, backward=backward)
    ]
    lanes = {
        f"{operation}{' backward' if backward else ''}": operation.lane
        for backward in (False, True)
        for operation in schedule(GROUPS, expert_ranks, tensor_ranks, backward=backward)
    }
    for spans in by_rank:
        # All ranks issue the same order, and so does every process group.
        assert [name for name, _, _ in spans] == listed
        for lane in Lane:
            mine = [name for name, _, _ in spans if lanes[name] is lane]
            assert mine == [name for name in listed if lanes[name] is lane]
        assert all(before[2] <= after[1] for before, after in itertools.pairwise(spans)), "no span lies within another"
        ends = {name: end for name, _, end in spans}
        for suffix in ("", " backward"):
            for group in range(GROUPS - 1):
                assert ends[f"dispatch {group + 1}{suffix}"] < ends[f"experts {group}{suffix}"]


ROW_SECONDS = 2e-4
"""Of a pass of one row through an expert: slow enough that other programs on the machine are a small share."""


def measured(rank: int, world_size: int, case: Case, rate: float) -> tuple[float, float]:
    """Seconds of a layer with links of ``rate`` bytes a second, without groups and with them."""
    layer = Layer(rank, case, latency=0.0)
    layer.slow(0.001, rate)
    experts = SlowExperts(ROW_SECONDS)
    layer.run(1, experts)
    without, with_groups = (min(layer.run(groups, experts) for _ in range(2)) for groups in (1, case.groups))
    return without, with_groups


def load_of(case: Case) -> Load:
    """Of every rank, if experts are loaded evenly."""
    return Load(sum(case.tokens) * case.topk / case.ranks, case.hidden * 4, case.expert_ranks, case.tensor_ranks)


@pytest.mark.parametrize(("expert_ranks", "tensor_ranks", "busy"), [(2, 1, 1.1), (2, 2, 0.7)])
def test_groups_save_time(expert_ranks: int, tensor_ranks: int, busy: float, workers: WorkerPool) -> None:
    """1.3 times as fast in the same run, where EP's messages take ``busy`` times as long as all products.

    One group hides something already: what it sends back travels beside its weights' gradients.
    """
    ranks = expert_ranks * tensor_ranks
    case = Case(expert_ranks, tensor_ranks, 8, (400,) * ranks, hidden=64, ffn=8, dtype=torch.float32)
    products = 3 * sum(case.tokens) * case.topk / case.expert_ranks * ROW_SECONDS
    messages = 4 * sum(case.tokens) * case.topk / ranks * case.hidden * 4 * (expert_ranks - 1) / expert_ranks
    rate = messages / (busy * products)
    without, with_groups = workers.run(measured, case, rate, world_size=ranks)[0]
    assert without > 1.3 * with_groups, (without, with_groups)
    # The simulation says how long, but for what the machine adds.
    load, pace = load_of(case), Pace(ROW_SECONDS, 0.001, rate)
    assert 0.97 * load.simulated(1, pace) < without
    assert 0.97 * load.simulated(8, pace) < with_groups
