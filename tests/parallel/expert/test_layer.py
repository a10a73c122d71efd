"""Experts over ranks against one process that goes by the formula, in float64: output and every gradient."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.common.expert_ranks import process_groups
from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne
from megatron_m1.parallel.expert.layer import Call, expert_layer
from megatron_m1.parallel.expert.links import GroupLink, Links, Work
from megatron_m1.parallel.expert.plan import Ranks, plan_exchange
from megatron_m1.runtime.pool import WorkerPool
from tests.parallel.expert.ranks import Case, Outcome, run_rank, shard, truth

TOLERANCE = 1e-12

CASES = {
    "one rank": Case(1, 1, 3, (13,)),
    "ep2": Case(2, 1, 2, (13, 11)),
    "ep4, one group": Case(4, 1, 1, (7, 3, 9, 5)),
    "ep4, many experts": Case(4, 1, 4, (17, 3, 9, 5), experts=8),
    "etp2": Case(1, 2, 2, (8, 5)),
    "ep2 etp2": Case(2, 2, 4, (17, 3, 9, 12)),
    "ep2 etp3": Case(2, 3, 3, (7, 3, 9, 5, 1, 8)),
    "fewer tokens than groups": Case(2, 2, 4, (3, 1, 0, 2)),
    "no tokens at all": Case(2, 2, 2, (0, 0, 0, 0)),
    "all to one": Case(2, 2, 2, (8, 3, 9, 5), to_one=True),
    "an expert without tokens": Case(4, 1, 2, (8, 3, 9, 5), to_one=True, topk=1),
    "with drops": Case(2, 2, 3, (8, 3, 9, 5), drop=0.4),
    "computed again": Case(2, 2, 3, (8, 3, 9, 5), drop=0.2, recompute=True),
    "five of eight": Case(2, 1, 3, (8, 13), experts=8, topk=5),
}


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def compare(case: Case, by_rank: list[Outcome], tolerance: float) -> None:
    wanted = truth(case)
    for name in ("output", "hidden", "probs"):
        found = torch.cat([getattr(part, name) for part in by_rank])
        assert _error(found, getattr(wanted, name)) < tolerance, name
    for rank, part in enumerate(by_rank):
        mine = shard(wanted.weights, case, rank // case.tensor_ranks, rank % case.tensor_ranks)
        for index, (found, expected) in enumerate(zip(part.weights, mine, strict=True)):
            assert _error(found, expected) < tolerance, f"rank {rank}, weight {index}"


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_computes(name: str, workers: WorkerPool) -> None:
    case = CASES[name]
    compare(case, workers.run(run_rank, case, world_size=case.ranks), TOLERANCE)


def alone(case: Case) -> Outcome:
    hidden, probs, chosen, grad = case.inputs(0)
    leaves = [x.requires_grad_() for x in (hidden, probs, *case.weights())]
    plan = plan_exchange(chosen, case.groups, Ranks(None, None, None))
    output = expert_layer(hidden, probs, leaves[2:], Call(plan, Links(None, None), OneByOne()))
    grads = torch.autograd.grad(output, leaves, grad)
    return Outcome(output.detach(), grads[0], grads[1], list(grads[2:]))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_change_no_bit_but_of_the_weights_sums(groups: int) -> None:
    """Nothing else is a sum over tokens of several groups."""
    one, cut = (alone(Case(1, 1, number, (64,), hidden=64, ffn=32)) for number in (1, groups))
    for name in ("output", "hidden", "probs"):
        assert torch.equal(getattr(cut, name), getattr(one, name)), name
    for found, wanted in zip(cut.weights, one.weights, strict=True):
        assert _error(found, wanted) < TOLERANCE


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        found = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in ("mm", "linear")):
            self.shapes[tuple(found.shape)] += 1
        return found


def with_frozen(case: Case, frozen: set[int]) -> tuple[list[Tensor | None], Counter[tuple[int, ...]]]:
    """Gradients of hidden, probs and every weight, and what products were made."""
    hidden, probs, chosen, grad = case.inputs(0)
    leaves = [hidden, probs, *case.weights()]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index - 2 not in frozen)
    plan = plan_exchange(chosen, case.groups, Ranks(None, None, None))
    with Products() as products:
        output = expert_layer(hidden, probs, leaves[2:], Call(plan, Links(None, None), OneByOne(), case.recompute))
        output.backward(grad)
    return [leaf.grad for leaf in leaves], products.shapes


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_weights_cost_no_products(recompute: bool) -> None:
    """Nor do they change what others get."""
    case = Case(1, 1, 2, (32,), experts=3, hidden=12, ffn=5, recompute=recompute)
    everything, all_products = with_frozen(case, set())
    for frozen in ({1}, {0, 2}, set(range(6))):
        found, products = with_frozen(case, frozen)
        for index, (ours, wanted) in enumerate(zip(found, everything, strict=True)):
            if index - 2 in frozen:
                assert ours is None
            else:
                assert ours is not None and wanted is not None
                assert torch.equal(ours, wanted)
        saved = Counter((2 * case.ffn, case.hidden) if index % 2 == 0 else (case.hidden, case.ffn) for index in frozen)
        # Of every group.
        assert all_products - products == Counter({shape: case.groups * times for shape, times in saved.items()})


def test_a_frozen_layer_keeps_no_tokens() -> None:
    """What an expert keeps of its input is for fc1's gradient alone."""
    weights = Case(1, 1, 1, (8,)).weights()
    hidden = torch.randn(8, 10, dtype=torch.float64)
    for is_frozen in (True, False):
        for weight in weights:
            weight.requires_grad_(not is_frozen)
        with torch.no_grad():
            _, kept = OneByOne().forward(hidden, hidden[:, 0], [2, 2, 2, 2], weights)
        assert all((one.x is None) == is_frozen for one in kept)


class CountedLink(GroupLink):
    """Counts the numbers of the rows that it sends."""

    sent = 0

    def all_to_all(self, output: Tensor, input: Tensor, receives: list[int], sends: list[int]) -> Work:
        """As ``GroupLink``'s, counted; the scales are no rows."""
        self.sent += input.numel() if input.dim() == 2 else 0
        return super().all_to_all(output, input, receives, sends)


def travelled(rank: int, world_size: int, case: Case, *, again: bool) -> tuple[int, int]:
    """Numbers sent there and back, and those of every pair's token; ``again``: under full recomputation."""
    ranks = process_groups(case.expert_ranks, case.tensor_ranks, rank)
    hidden, probs, chosen, grad = case.inputs(rank)
    assert ranks.expert is not None
    link = CountedLink(ranks.expert)
    weights = shard(case.weights(), case, rank, 0)
    leaves = [x.requires_grad_() for x in (hidden, probs, *weights)]
    call = Call(plan_exchange(chosen, case.groups, ranks), Links(link, None), OneByOne(), case.recompute)
    if again:
        output = checkpoint(expert_layer, hidden, probs, weights, call, use_reentrant=False)
    else:
        output = expert_layer(hidden, probs, weights, call)
    torch.autograd.grad(output, leaves, grad)
    return link.sent, int(chosen.sum()) * case.hidden


@pytest.mark.parametrize(("recompute", "again", "times"), [(False, False, 4), (True, False, 5), (False, True, 6)])
def test_how_often_tokens_travel(recompute: bool, again: bool, times: int, workers: WorkerPool) -> None:
    """There, and back with results; gradients the same way. Recomputed experts want the token once more; a layer that
    is run again, its result as well.
    """
    case = Case(2, 1, 2, (13, 11), recompute=recompute)
    found = workers.run(partial(travelled, again=again), case, world_size=2)
    assert sum(sent for sent, _ in found) == times * sum(once for _, once in found)
