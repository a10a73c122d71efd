"""What an expert layer holds at its peak: groups hold less, and no more travels at once the more there are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.common.expert_ranks import process_groups
from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne
from megatron_m1.parallel.expert.layer import Call, expert_layer
from megatron_m1.parallel.expert.links import GroupLink, Links, Work
from megatron_m1.parallel.expert.plan import GroupPlan, Ranks, plan_exchange
from megatron_m1.parallel.expert.schedule import Kind, schedule
from megatron_m1.runtime.pool import WorkerPool
from tests.parallel.expert.ranks import Case, shard

MESHES = [(2, 1), (2, 2)]
CPU = torch.device("cpu")


class CountedLink(GroupLink):
    """Counts the bytes of everything that was given to the links that share ``alive`` and still exists."""

    def __init__(self, group: torch.distributed.ProcessGroup, alive: dict[int, int], peaks: list[int]) -> None:
        super().__init__(group)
        self._alive, self._peaks = alive, peaks

    def _count(self, *buffers: Tensor) -> None:
        for storage in (buffer.untyped_storage() for buffer in buffers):
            if id(storage) not in self._alive:
                self._alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, id(storage))
        self._peaks.append(sum(self._alive.values()))

    def all_to_all(self, output: Tensor, input: Tensor, receives: list[int], sends: list[int]) -> Work:
        """As ``GroupLink``'s, counted."""
        self._count(output, input)
        return super().all_to_all(output, input, receives, sends)

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """As ``GroupLink``'s, counted."""
        self._count(output, input)
        return super().all_gather(output, input)

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Work:
        """As ``GroupLink``'s, counted."""
        self._count(output, input)
        return super().reduce_scatter(output, input)


@dataclass(frozen=True)
class Held:
    """Of one rank, bytes."""

    peak: int
    """The most that the layer holds, there and back, besides its arguments and the output's gradient."""
    travelling: int
    """The most of what was sent or received."""
    of_groups: list[int]
    """What one group sends and receives on its way there, over EP and over ETP."""


def exchange_bytes(plan: GroupPlan, ranks: Ranks, row_bytes: int) -> int:
    """What one group sends and receives in one direction."""
    rows = len(plan.tokens) + plan.received
    if ranks.tensor is not None:
        rows += plan.rows.part + plan.rows.arrived
    return rows * row_bytes


def held(rank: int, world_size: int, case: Case, *, under_ddp: bool = False) -> Held:
    """Run a layer there and back, and watch what tensors there are; DDP's sums, if it has any, are there before."""
    ranks = process_groups(case.expert_ranks, case.tensor_ranks, rank)
    hidden, probs, chosen, grad = case.inputs(rank)
    weights = shard(case.weights(), case, rank // case.tensor_ranks, rank % case.tensor_ranks)
    leaves = [x.requires_grad_() for x in (hidden, probs, *weights)]
    alive: dict[int, int] = {}
    peaks = [0]
    links = Links(
        *(None if group is None else CountedLink(group, alive, peaks) for group in (ranks.expert, ranks.tensor))
    )
    plan = plan_exchange(chosen, case.groups, ranks)
    tracker = MemTracker()
    tracker.track_external(*leaves, grad)
    if under_ddp:
        for weight in leaves[2:]:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
            tracker.track_external(weight.main_grad)  # type: ignore[attr-defined]
    before = tracker.get_tracker_snapshot()[CPU]["Total"]
    with tracker:
        output = expert_layer(hidden, probs, weights, Call(plan, links, OneByOne(), case.recompute))
        torch.autograd.grad(output, leaves, grad)
    # With recomputation, a token travels once more together with its gradient.
    row_bytes = hidden.shape[1] * hidden.element_size() * (2 if case.recompute else 1)
    of_groups = [exchange_bytes(group, ranks, row_bytes) for group in plan.groups]
    return Held(tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before, max(peaks), of_groups)


def case_of(expert_ranks: int, tensor_ranks: int, groups: int, *, recompute: bool = False) -> Case:
    tokens = (512,) * (expert_ranks * tensor_ranks)
    return Case(expert_ranks, tensor_ranks, groups, tokens, hidden=64, ffn=32, dtype=torch.float32, recompute=recompute)


def test_the_tracker_counts_what_exists() -> None:
    """A tensor in use, one that is gone, and views, which share their storage."""
    tracker = MemTracker()
    with tracker:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        second[:10].add_(second[10:20])
    assert tracker.get_tracker_snapshot("peak")[CPU]["Total"] == 4000
    assert tracker.get_tracker_snapshot()[CPU]["Total"] == 2000


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), MESHES)
def test_groups_hold_no_more(expert_ranks: int, tensor_ranks: int, recompute: bool, workers: WorkerPool) -> None:
    """The four groups' peak is at most that of one group and the exchange buffers of two."""
    ranks = expert_ranks * tensor_ranks
    one, four = (
        workers.run(held, case_of(expert_ranks, tensor_ranks, groups, recompute=recompute), world_size=ranks)
        for groups in (1, 4)
    )
    for whole, cut in zip(one, four, strict=True):
        assert cut.peak <= whole.peak + 2 * max(cut.of_groups)
        # It is a good deal less, in truth: other groups' activations are not there at once.
        assert cut.peak < 0.8 * whole.peak


def all_weights(expert_ranks: int, tensor_ranks: int) -> Case:
    """In bfloat16, with few tokens: what groups save elsewhere does not hide what they do with weights."""
    tokens = (16,) * (expert_ranks * tensor_ranks)
    case = case_of(expert_ranks, tensor_ranks, 1)
    return replace(case, tokens=tokens, hidden=128, ffn=256, dtype=torch.bfloat16)


@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), MESHES)
def test_in_training_sums_of_16_bit_gradients_cost_nothing(
    expert_ranks: int, tensor_ranks: int, workers: WorkerPool
) -> None:
    """Groups' gradients are added to DDP's sums: four groups hold no more than one and two groups' exchange buffers.

    One group's are returned in 16 bits, as without groups.
    """
    case = all_weights(expert_ranks, tensor_ranks)
    four = workers.run(partial(held, under_ddp=True), replace(case, groups=4), world_size=expert_ranks * tensor_ranks)
    one = workers.run(held, case, world_size=expert_ranks * tensor_ranks)
    sizes = [weight.numel() for weight in shard(case.weights(), case, 0, 0)]
    for whole, cut in zip(one, four, strict=True):
        assert cut.peak <= whole.peak + 2 * max(cut.of_groups)
        # Less than the gradients alone, in 16 bits.
        assert cut.peak < 2 * sum(sizes) < whole.peak


@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), MESHES)
def test_elsewhere_sums_of_16_bit_gradients_cost_two_bytes_a_weight(
    expert_ranks: int, tensor_ranks: int, workers: WorkerPool
) -> None:
    """Where there is no such sum, several groups' are added up in float32, and rounded one by one."""
    ranks, case = expert_ranks * tensor_ranks, all_weights(expert_ranks, tensor_ranks)
    one, four = (workers.run(held, replace(case, groups=groups), world_size=ranks) for groups in (1, 4))
    sizes = [weight.numel() for weight in shard(case.weights(), case, 0, 0)]
    for whole, cut in zip(one, four, strict=True):
        more = cut.peak - whole.peak
        # One expert's two are there in both precisions.
        assert sum(sizes) < more <= 2 * sum(sizes) + 2 * sum(sizes[:2]) + 2 * max(cut.of_groups)


def groups_on_their_way(expert_ranks: int, tensor_ranks: int, groups: int) -> int:
    """The most groups at once that are between their first exchange and their products, or after them, by the list."""
    first = Kind.DISPATCH if expert_ranks > 1 else Kind.GATHER
    most, here = 0, set()
    for operation in schedule(groups, expert_ranks, tensor_ranks):
        if operation.kind is first:
            here.add(operation.group)
        if operation.kind is Kind.COLLECT:
            here.discard(operation.group)
        most = max(most, len(here))
    return most


@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), MESHES)
def test_what_travels_does_not_grow_with_groups(expert_ranks: int, tensor_ranks: int, workers: WorkerPool) -> None:
    """However many groups there are, those between dispatch and collect bound the buffers."""
    at_once = {groups_on_their_way(expert_ranks, tensor_ranks, groups) for groups in (8, 16, 64)}
    assert len(at_once) == 1
    (most,) = at_once
    assert most == (4 if tensor_ranks == 1 else 6)
    for found in workers.run(held, case_of(expert_ranks, tensor_ranks, 8), world_size=expert_ranks * tensor_ranks):
        assert 0 < found.travelling <= most * max(found.of_groups) < sum(found.of_groups)
