"""What the benchmark of token groups models: sizes, how lists are run for many ranks, and what groups cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.common.expert_costs import GPU, NETWORKS, Costs, Host, Layer, Network, layer_times
from benchmarks.common.slow_layer import Bench, Pace, measure
from megatron_m1.parallel.expert.schedule import Kind, Lane, Operation
from megatron_m1.parallel.expert.simulate import Shape, run_ranks
from megatron_m1.runtime.pool import WorkerPool

SLOW, FREE = Network("slow", 1e10, 1e-5, 1e9, 1e-4), Host(0.0, 0.0)


def test_bytes_and_flops_of_a_layer() -> None:
    """M1's, by hand: 16,384 pairs of 12,288 bytes; a node has 8 of 16 ranks."""
    layer = Layer(16, 1)
    assert (layer.held, layer.weights) == (2, 2 * 3 * 6144 * 9216)
    assert (layer.outside(), layer.inside()) == (0.5, 0.4375)
    forward = Costs(layer, SLOW, 1, backward=False)
    copied = 2 * 16384 * 12288 / GPU.memory
    assert forward.duration(Operation(Kind.DISPATCH)) == pytest.approx(copied + 1e-4 + 0.5 * 16384 * 12288 / 1e9)
    weights = Costs(layer, SLOW, 1, backward=True).duration(Operation(Kind.WEIGHTS))
    assert weights == pytest.approx(16384 * 6 * 6144 * 9216 / (989e12 * 0.6))


def test_ranks_of_a_node_stay_in_it() -> None:
    assert Layer(8, 1).outside() == 0.0
    assert Layer(8, 1).inside() == 7 / 8
    # Two ETP ranks are neighbours: four EP ranks of each column are in the node.
    assert Layer(8, 2).outside() == 0.5
    assert Layer(32, 4).outside() == 30 / 32


def test_shards_add_up_in_float32_forward() -> None:
    layer = Layer(8, 2)
    for backward, width in ((False, 4), (True, 2)):
        seconds = Costs(layer, SLOW, 1, backward).duration(Operation(Kind.REDUCE))
        assert seconds == pytest.approx(1e-5 + 16384 * 6144 * width / 1e10)


def test_recomputed_tokens_travel_with_their_gradients() -> None:
    once, twice = (Costs(replace(Layer(8, 2), recompute=again), SLOW, 1, True) for again in (False, True))
    gathers = [costs.duration(Operation(Kind.GATHER)) - 1e-5 for costs in (once, twice)]
    assert gathers[1] == pytest.approx(2 * gathers[0])
    assert once.duration(Operation(Kind.COMBINE)) == twice.duration(Operation(Kind.COMBINE))


@pytest.mark.parametrize("mesh", [(4, 1), (4, 2), (3, 4)])
def test_two_ranks_a_group_stand_for_all(mesh: tuple[int, int]) -> None:
    layer, total = Layer(*mesh, experts=12), 0.0
    for backward in (False, True):
        ends = Costs(layer, SLOW, 4, backward).run(*mesh)
        assert min(ends) == max(ends)
        total += ends[0]
    assert layer_times(layer, SLOW, 4).total == pytest.approx(total)


def test_groups_hide_more_until_they_cost_more() -> None:
    layer = Layer(32, 1)
    hidden = [layer_times(layer, NETWORKS[1], g, host=FREE, fused_totals=True).hidden for g in (1, 2, 4, 8)]
    assert hidden == sorted(hidden)
    assert hidden[0] < 0.3
    assert hidden[3] > 0.8
    # Few tokens in a process that is slow to issue: the more groups, the slower.
    slow = [layer_times(replace(layer, tokens=512), NETWORKS[1], g, host=Host(2e-4, 8e-4)).total for g in (1, 2, 4, 8)]
    assert slow == sorted(slow)
    assert slow[3] > 5 * slow[0]


def test_adding_up_weights_costs_less_inside_the_products() -> None:
    layer = Layer(8, 1)
    apart, fused = (layer_times(layer, NETWORKS[1], 8, fused_totals=inside) for inside in (False, True))
    assert fused.total < apart.total
    assert fused.travel == apart.travel


def test_issuing_takes_time() -> None:
    """A process that needs 2 s an operation: its last one is issued after all of them."""
    shape = Shape(2, 2, 1)
    spans = run_ranks(shape, lambda rank, operation: 0.0, issue=lambda rank, operation: 2.0)[0]
    assert [spans[operation].issued for operation in shape.schedule()] == [
        2.0 * (place + 1) for place in range(len(shape.schedule()))
    ]


def test_nothing_overlaps_where_links_wait(workers: WorkerPool) -> None:
    """The slow layer takes what the list says at least, and overlapping saves what it says, nearly."""
    bench, pace = Bench(2, 1, tokens=64), Pace(5e-4, 2e-3, 3e5)
    off, (four,) = workers.run(measure, bench, pace, [4], 2, world_size=2)[0]
    assert off > 0.97 * bench.load.one_after_the_other(pace)
    assert 0.97 * bench.load.simulated(4, pace) < four < off


def test_lists_of_one_group_add_up() -> None:
    load, pace = Bench(2, 2).load, Pace(1e-4, 1e-3, 1e6)
    parts = [
        load.seconds(operation, 1, pace)
        for backward in (False, True)
        for operation in Shape(1, 2, 2, backward).schedule()
        if operation.lane is Lane.COMPUTE
    ]
    assert sum(parts) == pytest.approx(3 * load.rows * 2 * 1e-4)
    assert load.one_after_the_other(pace) > load.simulated(1, pace) > sum(parts)
