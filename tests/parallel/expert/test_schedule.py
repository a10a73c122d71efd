"""The lists that expert layers run: order, overlap, no deadlock; without processes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.parallel.expert.schedule import Kind, Lane, Operation, chain_of, needs, schedule
from megatron_m1.parallel.expert.simulate import Duration, Shape, run_ranks

SCALES = (Kind.SEND_SCALES, Kind.SHARE_SCALES)

shapes = st.builds(
    Shape,
    groups=st.integers(1, 9),
    expert_ranks=st.integers(1, 64),
    tensor_ranks=st.integers(1, 8),
    backward=st.booleans(),
).filter(lambda shape: shape.ranks <= 64)


def durations(seed: int) -> Duration:
    """Times that differ by rank and operation, and have no pattern."""

    def duration(rank: int, operation: Operation) -> float:
        number = seed + 31 * rank + 7 * operation.group + 3 * list(Kind).index(operation.kind)
        return 1 + number**2 % 97 / 97

    return duration


@given(shapes, st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_shape_deadlocks(shape: Shape, seed: int, blocking: bool) -> None:
    """Every rank comes to the end, whatever takes how long."""
    for spans in run_ranks(shape, durations(seed), blocking=blocking):
        assert set(spans) == set(shape.schedule())


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_everything_comes_once_and_after_what_it_needs(shape: Shape) -> None:
    found = shape.schedule()
    assert len(set(found)) == len(found)
    chain = chain_of(shape.expert_ranks, shape.tensor_ranks)
    extra = (Kind.WEIGHTS,) if shape.backward else ()
    for group in range(shape.groups):
        mine = [op.kind for op in found if op.group == group and op.kind not in (*SCALES, Kind.WEIGHTS)]
        assert mine == list(chain)
        assert all(Operation(kind, group) in found for kind in extra)
    place = {operation: index for index, operation in enumerate(found)}
    for operation in found:
        sizes = (shape.groups, shape.expert_ranks, shape.tensor_ranks)
        assert all(place[other] < place[operation] for other in needs(operation, *sizes, backward=shape.backward))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), [(2, 1), (2, 2), (1, 2)])
def test_the_next_groups_travel_while_one_is_computed(expert_ranks: int, tensor_ranks: int, backward: bool) -> None:
    groups = 5
    found = schedule(groups, expert_ranks, tensor_ranks, backward=backward)
    place = {operation: index for index, operation in enumerate(found)}
    incoming = chain_of(expert_ranks, tensor_ranks)[0]
    for group in range(groups - 1):
        # The experts of a group begin after the next group's tokens were sent on their way.
        assert place[Operation(incoming, group + 1)] < place[Operation(Kind.EXPERTS, group)]
    for kind in (Kind.REDUCE, Kind.COMBINE):
        if Operation(kind, 0) not in place:
            continue
        # Nothing is left to hide what the last groups send.
        for group in range(groups - 2):
            # A result is waited for after another group's products, which hide its way.
            following = Kind.COMBINE if kind is Kind.REDUCE and expert_ranks > 1 else Kind.COLLECT
            sent, waited = place[Operation(kind, group)], place[Operation(following, group)]
            assert any(sent < place[Operation(Kind.EXPERTS, other)] < waited for other in range(groups))
    if backward:
        for group in range(groups):
            outgoing = Kind.REDUCE if tensor_ranks > 1 else Kind.COMBINE
            assert place[Operation(outgoing, group)] < place[Operation(Kind.WEIGHTS, group)]


def test_ranks_that_disagree_are_found() -> None:
    shape = Shape(2, 2, 1)
    normal = shape.schedule()
    swapped = list(normal)
    first, second = (normal.index(Operation(Kind.DISPATCH, group)) for group in range(2))
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(RuntimeError, match="at once in one process group"):
        run_ranks(shape, lambda rank, operation: 1.0, programs={1: tuple(swapped)})


def test_a_rank_that_waits_for_itself_is_found() -> None:
    """Collected before it is combined: the simulation sees what a real run would hang in."""
    shape = Shape(1, 2, 1)
    normal = list(shape.schedule())
    combine, collect = (normal.index(Operation(kind)) for kind in (Kind.COMBINE, Kind.COLLECT))
    normal[combine], normal[collect] = normal[collect], normal[combine]
    with pytest.raises(RuntimeError, match="no rank can go on"):
        run_ranks(shape, lambda rank, operation: 1.0, programs=dict.fromkeys((0, 1), tuple(normal)), blocking=True)


def test_collectives_of_one_group_run_one_after_the_other() -> None:
    spans = run_ranks(Shape(4, 4, 2), durations(3))
    for rank in spans:
        for lane in Lane:
            times = sorted((s.begun, s.ended) for op, s in rank.items() if op.lane is lane)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("blocking", [False, True])
def test_groups_hide_what_travels(blocking: bool) -> None:
    """Messages that take as long as the products: with eight groups, most of their time is hidden."""

    def end(groups: int) -> float:
        def duration(rank: int, operation: Operation) -> float:
            costs = {Kind.DISPATCH: 0.3, Kind.COMBINE: 0.3, Kind.GATHER: 0.2, Kind.REDUCE: 0.2, Kind.EXPERTS: 1.0}
            return costs.get(operation.kind, 0.0) / groups

        return max(span.ended for span in run_ranks(Shape(groups, 2, 2), duration, blocking=blocking)[0].values())

    assert end(1) == pytest.approx(2.0)
    # The first group's way in and the last one's way out are left: an eighth of 1.0.
    assert end(8) == pytest.approx(1.125, abs=0.1)
