"""Runs schedules without processes: who waits for whom, and how long all of it takes when messages take time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from megatron_m1.parallel.expert.schedule import Lane, Operation, needs, schedule

Duration = Callable[[int, Operation], float]
"""Of an operation on a rank, seconds. A collective takes the longest of its ranks."""


@dataclass(frozen=True)
class Shape:
    """Of one layer and pass."""

    groups: int
    expert_ranks: int
    tensor_ranks: int
    backward: bool = False

    @property
    def ranks(self) -> int:
        """That share the layer's experts."""
        return self.expert_ranks * self.tensor_ranks

    def partners(self, rank: int, lane: Lane) -> tuple[int, ...]:
        """The ranks of ``rank``'s process group for a lane, itself among them; ETP ranks are neighbours."""
        tensor, expert = rank % self.tensor_ranks, rank // self.tensor_ranks
        if lane is Lane.EXPERT:
            return tuple(other * self.tensor_ranks + tensor for other in range(self.expert_ranks))
        if lane is Lane.TENSOR:
            return tuple(expert * self.tensor_ranks + other for other in range(self.tensor_ranks))
        return (rank,)

    def schedule(self) -> tuple[Operation, ...]:
        """What every rank runs."""
        return schedule(self.groups, self.expert_ranks, self.tensor_ranks, backward=self.backward)


@dataclass(frozen=True)
class Span:
    """When an operation was issued, when it began in its lane, and when it ended."""

    issued: float
    begun: float
    ended: float


@dataclass
class _Rank:
    number: int
    program: tuple[Operation, ...]
    clock: float = 0.0
    issued: dict[Operation, float] = field(default_factory=dict)
    spans: dict[Operation, Span] = field(default_factory=dict)
    queues: dict[Lane, list[Operation]] = field(default_factory=lambda: {lane: [] for lane in Lane})

    @property
    def upcoming(self) -> Operation | None:
        """What is issued next."""
        return self.program[len(self.issued)] if len(self.issued) < len(self.program) else None


class _Simulation:
    def __init__(
        self, shape: Shape, duration: Duration, ranks: list[_Rank], *, issue: Duration | None, blocking: bool
    ) -> None:
        self.shape, self.duration, self.ranks, self.blocking = shape, duration, ranks, blocking
        self.issue_time = issue
        self.free: dict[tuple[Lane, tuple[int, ...]], float] = {}
        self.done: dict[tuple[Lane, tuple[int, ...]], int] = {}
        for lane in Lane:
            for rank in range(shape.ranks):
                self.free[lane, shape.partners(rank, lane)] = 0.0
                self.done[lane, shape.partners(rank, lane)] = 0
        self.needs = cache(
            lambda operation: needs(
                operation, shape.groups, shape.expert_ranks, shape.tensor_ranks, backward=shape.backward
            )
        )

    def ready(self, rank: _Rank, operation: Operation) -> float | None:
        """When what it needs has ended; None while that is not known."""
        spans = [rank.spans.get(other) for other in self.needs(operation)]
        if any(span is None for span in spans):
            return None
        return max((span.ended for span in spans if span is not None), default=0.0)

    def issue(self, rank: _Rank) -> bool:
        """Issue the rank's next operation, if it does not wait."""
        operation = rank.upcoming
        if operation is None:
            return False
        if self.blocking:
            last = rank.queues[Lane.COMPUTE][-1:]
            times = [self.ready(rank, operation), *(s.ended if (s := rank.spans.get(op)) else None for op in last)]
            if any(time is None for time in times):
                return False
            rank.clock = max([rank.clock, *(time for time in times if time is not None)])
        if self.issue_time is not None:
            rank.clock += self.issue_time(rank.number, operation)
        rank.issued[operation] = rank.clock
        rank.queues[operation.lane].append(operation)
        return True

    def begin(self, lane: Lane, partners: tuple[int, ...]) -> bool:
        """Begin the next operation of a lane: all its ranks have issued it, and what they need for it has ended."""
        ranks, place = [self.ranks[rank] for rank in partners], self.done[lane, partners]
        if any(len(rank.queues[lane]) <= place for rank in ranks):
            return False
        heads = {rank.queues[lane][place] for rank in ranks}
        if len(heads) > 1:
            raise RuntimeError(f"ranks {partners} issue {sorted(map(str, heads))} at once in one process group")
        (operation,) = heads
        times = [self.free[lane, partners]]
        for rank in ranks:
            time = self.ready(rank, operation)
            if time is None:
                return False
            times += [time, rank.issued[operation]]
        begun = max(times)
        ended = begun + max(self.duration(rank, operation) for rank in partners)
        self.free[lane, partners] = ended
        self.done[lane, partners] += 1
        for rank in ranks:
            rank.spans[operation] = Span(rank.issued[operation], begun, ended)
        return True

    def run(self) -> None:
        while any(len(rank.spans) < len(rank.program) for rank in self.ranks):
            moved = [self.issue(rank) for rank in self.ranks]
            moved += [self.begin(lane, partners) for lane, partners in self.free]
            if not any(moved):
                stuck = {number: str(rank.upcoming) for number, rank in enumerate(self.ranks) if rank.upcoming}
                raise RuntimeError(f"no rank can go on; next would be {stuck}")


def run_ranks(
    shape: Shape,
    duration: Duration,
    *,
    programs: Mapping[int, tuple[Operation, ...]] | None = None,
    issue: Duration | None = None,
    blocking: bool = False,
) -> list[dict[Operation, Span]]:
    """Run every rank's list, with process groups that run their collectives one after the other.

    A collective begins when all its ranks have issued it and its group is free; a rank's products begin when the ones
    before have ended, and when what they need has arrived.

    Args:
        shape: of the layer and pass.
        duration: how long each operation takes.
        programs: lists by rank where they are not the schedule.
        issue: how long the process needs to issue each operation, one after the other; None is no time.
        blocking: the process itself waits before it issues anything (a CPU), instead of the lane (a GPU's stream).

    Returns:
        When every operation ran, by rank.

    Raises:
        RuntimeError: no rank can go on, or the ranks of a process group issue its collectives in different orders.
    """
    given = programs or {}
    ranks = [_Rank(rank, given.get(rank, shape.schedule())) for rank in range(shape.ranks)]
    _Simulation(shape, duration, ranks, issue=issue, blocking=blocking).run()
    return [rank.spans for rank in ranks]
